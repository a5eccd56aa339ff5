"""The network against the peers' at equal configuration: forward and training step, FLOPs, share of the machine's peak.

    python benchmarks/peers.py --janspiry CHECKOUT --guided-diffusion CHECKOUT --output benchmarks/results/peers.json

The checkouts are of Janspiry/Palette-Image-to-Image-Diffusion-Models and openai/guided-diffusion; a peer without one is
left out. diffusers' `UNet2DModel` is always there. Nothing of theirs is in this project. Calls take turns (A/B in one
process); medians, and half of the range between the quartiles. Forwards are in evaluation mode. The peak is that of a
3x3 convolution of 256 channels on a CPU, of a matrix product of 8192 on a GPU, and takes its turn among them; ours is
in channels-last layout where it says so. float32 takes TF32 on a GPU, everyone's.
"""

import argparse
import copy
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from palette_diffusers import PaletteUNet2DModel
from palette_diffusers.fused import use_fused_blocks
from palette_diffusers.machine import best_device
from palette_diffusers.norms import use_channels_last_norms
from palette_diffusers.replay import record
from palette_diffusers.winograd import use_winograd

# base width, multipliers, blocks a level, attention from this level on, pixels, batch
NETWORKS = {
    "64 pixels, 128 wide": (128, (1, 2, 3, 4), 2, 2, 64, 4),
    "64 pixels, 64 wide": (64, (1, 2, 4, 8), 2, 3, 64, 8),
    "256 pixels, the paper's": (256, (1, 1, 2, 2, 4, 4), 2, 3, 256, 1),
}
USUAL = list(NETWORKS)[:2]
LAST = ", channels last"
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def processor() -> tuple[str, list[str]]:
    """The processor's name, as far as it is known, and its flags."""
    name, flags = platform.processor() or platform.machine(), []
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        key, _, value = map(str.strip, line.partition(":"))
        if key == "model name":
            name = value
        elif key == "flags":
            return name, value.split()
    return name, flags


def machine() -> dict[str, str]:
    name, flags = processor()
    name = ", ".join([name, *(f for f in ("avx512_bf16", "amx_bf16") if f in flags)])
    about = {"cpu": name, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    return about | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of each call, one of each in turn, after one that is not counted: median, half the quartiles' range."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(values), _spread(values)) for name, values in times.items()}


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def our_network(name: str) -> PaletteUNet2DModel:
    width, multipliers, blocks, attention, size, _ = NETWORKS[name]
    levels = len(multipliers)
    return PaletteUNet2DModel(
        sample_size=size,
        block_out_channels=[width * m for m in multipliers],
        down_block_types=["ResnetDownsampleBlock2D"] * attention + ["AttnDownBlock2D"] * (levels - attention),
        up_block_types=["AttnUpBlock2D"] * (levels - attention) + ["ResnetUpsampleBlock2D"] * attention,
        layers_per_block=blocks,
        attention_head_dim=64,
    )


def networks(name: str, janspiry: Path | None, guided: Path | None) -> dict[str, tuple[torch.nn.Module, Call]]:
    """Each implementation's network, and how it is called with (y, x, gamma)."""
    width, multipliers, blocks, attention, size, _ = NETWORKS[name]
    ours, levels = our_network(name), len(multipliers)
    shared = ("sample_size", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block")
    theirs = UNet2DModel(
        **{key: ours.config[key] for key in shared}, in_channels=6, attention_head_dim=64, attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
    )  # fmt: skip
    out: dict[str, tuple[torch.nn.Module, Call]] = {
        "ours": (ours, lambda y, x, gamma: ours(y, gamma, x).sample),
        "diffusers": (theirs, lambda y, x, gamma: theirs(torch.cat([x, y], 1), gamma * 1000).sample),
    }
    places = [2**i for i in range(attention, levels)]
    if janspiry is not None:
        sys.path.insert(0, str(janspiry))
        palette = importlib.import_module("models.guided_diffusion_modules.unet").UNet(
            image_size=size, in_channel=6, inner_channel=width, out_channel=3, res_blocks=blocks, attn_res=places,
            channel_mults=multipliers, num_head_channels=64,
        )  # fmt: skip
        out["Janspiry"] = (palette, lambda y, x, gamma: palette(torch.cat([x, y], 1), gamma))
    if guided is not None:
        sys.path.insert(0, str(guided))
        adm = importlib.import_module("guided_diffusion.unet").UNetModel(
            image_size=size, in_channels=6, model_channels=width, out_channels=3, num_res_blocks=blocks,
            attention_resolutions=places, channel_mult=multipliers, num_head_channels=64, use_scale_shift_norm=True,
            resblock_updown=True,
        )  # fmt: skip
        out["guided-diffusion"] = (adm, lambda y, x, gamma: adm(torch.cat([x, y], 1), gamma * 1000))
    return out


PEAK_FLOPS = 2 * 256 * 256 * 9 * 16 * 32 * 32
MATRIX = 8192
PEAKS = {"cpu": "convolution", "cuda": "matrix product"}


def peak(dtype: torch.dtype, device: str) -> tuple[Callable, int]:
    """What a share of peak is counted against, and its FLOPs: a 3x3 convolution, (16, 256, 32, 32) to as many channels;
    on a GPU, which those would not fill, a product of two square matrices."""
    if device == "cuda":
        a, b = torch.randn(2, MATRIX, MATRIX, dtype=dtype).unbind()
        return (lambda: a @ b), 2 * MATRIX**3
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(16, 256, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: layer(x)), PEAK_FLOPS


def cast(network: torch.nn.Module, dtype: torch.dtype) -> Call:
    """Ours, called in its own precision."""
    return lambda y, x, gamma: network(y.to(dtype), gamma, x.to(dtype)).sample


def flops(network: torch.nn.Module, *inputs: torch.Tensor, train: bool) -> int:
    """Of a forward pass, or with the backward pass; on the meta device, where nothing is computed."""
    network, inputs = copy.deepcopy(network).to("meta"), tuple(x.to("meta") for x in inputs)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.set_grad_enabled(train):
        out = network(*inputs).sample
        if train:
            out.square().mean().backward()
    return counter.get_total_flops()


def measure(
    name: str,
    janspiry: Path | None,
    guided: Path | None,
    rounds: int,
    compiled: bool,
    batch: int = 0,
    only: Sequence[str] = (),
) -> list[dict]:
    *_, size, usual = NETWORKS[name]
    batch = batch or usual
    device = torch.get_default_device().type
    y, x, eps = torch.randn(3, batch, 3, size, size).unbind()
    gamma = torch.rand(batch).clamp(0.01, 0.99)

    def forward(network: torch.nn.Module, call: Call) -> Callable:
        def run() -> None:
            network.eval()
            with torch.no_grad():
                call(y, x, gamma)

        return run

    def step(network: torch.nn.Module, call: Call, half: bool) -> torch.Tensor:
        network.train()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = call(y, x, gamma)
        (out.float() - eps).square().mean().backward()
        return out.detach()

    def training(network: torch.nn.Module, call: Call, half: bool) -> Callable:
        def run() -> None:
            step(network, call, half)
            network.zero_grad()

        return run

    def replayed(network: torch.nn.Module, call: Call) -> Callable:
        """A training step in half precision, recorded at its first call."""
        replay = cache(lambda: record(lambda: step(network, call, True), network.zero_grad)[0])
        return lambda: replay()()

    those = networks(name, janspiry, guided)
    for network, _ in those.values():
        with torch.no_grad():  # the same work whether or not an output was set to zero
            for p in network.parameters():
                if not p.any():
                    p.normal_(0, 0.01)
    calls: dict[tuple[str, str, str], Callable] = {}
    for who, (network, call) in those.items():
        calls["forward", who, "float32"] = forward(network, call)
        calls["training", who, "float32"] = training(network, call, False)
    ours = those["ours"][0]
    calls["training", "ours", "bfloat16"] = training(*those["ours"], True)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            what = str(dtype).removeprefix("torch.") + (LAST if layout == torch.channels_last else "")
            network = copy.deepcopy(ours).to(dtype, memory_format=layout)
            calls["forward", "ours", what] = forward(network, cast(network, dtype))
            if layout == torch.channels_last:
                network = copy.deepcopy(ours).to(memory_format=layout)
                use_channels_last_norms(network)
                call = cast(network, torch.float32)
                calls["training", "ours", what] = training(network, call, dtype == torch.bfloat16)
        calls["peak", PEAKS[device], what], most = peak(dtype, device)
    if device == "cpu":
        network = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        use_winograd(network)
        calls["forward", "ours", f"float32{LAST}, Winograd"] = forward(network, cast(network, torch.float32))
    if device == "cuda":
        network = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        use_fused_blocks(network)
        call = cast(network, torch.float32)
        calls["training", "ours", f"bfloat16{LAST}, fused"] = training(network, call, True)
        network = copy.deepcopy(network)
        call = cast(network, torch.float32)
        calls["training", "ours", f"bfloat16{LAST}, fused, replayed"] = replayed(network, call)
        half = copy.deepcopy(network).to(torch.bfloat16)
        calls["forward", "ours", f"bfloat16{LAST}, fused"] = forward(half, cast(half, torch.bfloat16))
    if compiled:
        network = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        network.compile_repeated_blocks()
        calls["training", "ours", f"bfloat16{LAST}, compiled"] = training(network, cast(network, torch.float32), True)
        half = copy.deepcopy(ours).to(torch.bfloat16, memory_format=torch.channels_last)
        half.compile_repeated_blocks()
        calls["forward", "ours", f"bfloat16{LAST}, compiled"] = forward(half, cast(half, torch.bfloat16))
    work = {what: flops(ours, y, gamma, x, train=what == "training") for what in ("forward", "training")}
    work["peak"] = most
    calls = {key: call for key, call in calls.items() if not only or any(text in "|".join(key) for text in only)}
    seconds = interleaved({"|".join(key): call for key, call in calls.items()}, rounds)
    rows = []
    for what, who, dtype in calls:
        median, spread = seconds[f"{what}|{who}|{dtype}"]
        row = {"network": name, "batch": batch, "what": what, "who": who, "dtype": dtype, "seconds": round(median, 4)}
        row |= {"spread": round(spread, 4), "GFLOP": round(work[what] / 1e9, 1)}
        row["GFLOP/s"] = round(work[what] / median / 1e9)
        fastest = seconds.get(f"peak|{PEAKS[device]}|{dtype.partition(',')[0]}{LAST}")
        row["share of peak"] = round(work[what] / median / (most / fastest[0]), 3) if fastest else ""
        public = seconds.get(f"{what}|Janspiry|float32")
        if public:
            row["times as fast as Janspiry"] = round(public[0] / median, 2)
        rows.append(row)
    return rows


def page(result: dict) -> str:
    """All rows as one Markdown table."""
    about = ", ".join(result["machine"].values())
    keys = list(result["rows"][0])
    lines = [f"{about}\n", "| " + " | ".join(keys) + " |", "| --- " * len(keys) + "|"]
    rows = [[str(row.get(key, "")) for key in keys] for row in result["rows"]]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--janspiry", type=Path, default=None, help="checkout of the public Palette implementation")
    parser.add_argument("--guided-diffusion", type=Path, default=None, help="checkout of openai/guided-diffusion")
    parser.add_argument("--networks", default=";".join(USUAL), help="names with semicolons between")
    parser.add_argument("--batch", type=int, default=0, help="pictures at a time; default: the network's own for a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows with one of these: ours|bfloat16,Janspiry")
    parser.add_argument("--device", default=best_device(), help="default: the best there is")
    parser.add_argument("--compile", action="store_true", help="rows of torch.compile too (minutes)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the page is written beside it as .md")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    for name in args.networks.split(";"):
        only = [text for text in args.only.split(",") if text]
        those = args.janspiry, args.guided_diffusion
        result["rows"] += measure(name, *those, args.rounds, args.compile, args.batch, only)
        if args.output:
            args.output.write_text(json.dumps(result, indent=2) + "\n")
            args.output.with_suffix(".md").write_text(page(result) + "\n")
    print(page(result))


if __name__ == "__main__":
    main()
