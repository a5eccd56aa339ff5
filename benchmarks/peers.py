"""The network against the peers' at equal configuration: forward and training step, FLOPs, share of the machine's peak.

    python benchmarks/peers.py --janspiry CHECKOUT --guided-diffusion CHECKOUT --output benchmarks/results/peers.json

The checkouts are of Janspiry/Palette-Image-to-Image-Diffusion-Models and openai/guided-diffusion; a peer without one is
left out. diffusers' `UNet2DModel` is always there. Nothing of theirs is in this project. Calls take turns (A/B in one
process); medians, and half of the range between the quartiles. Forwards are in evaluation mode. The peak is that of a
3x3 convolution of 256 channels on a CPU, of a matrix product of 8192 on a GPU, and takes its turn among them; ours is
in channels-last layout where it says so. float32 takes TF32 on a GPU, everyone's. What is measured is written
after each round, so that a run that is ended early leaves it.
"""

import argparse
import copy
import importlib
import json
import math
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
from palette_diffusers.files import write_text
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


def peak_memory() -> float:
    """GiB that this process held at most. On Linux not ru_maxrss, which is inherited from the parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def output_file(text: str) -> Path:
    """An option's file to write; its folder is made, so that no measurement ends without a place.

    Raises:
        argparse.ArgumentTypeError: a folder came, or its folder can't be made.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the folder of {text} can't be made: {error.strerror}") from None
    return path


def numbers(text: str) -> list[int]:
    """ "1,2,4", whole numbers of at least 0.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} came, expected whole numbers with commas between")
    return [int(part) for part in text.split(",")]


Times = dict[str, tuple[float, float]]


def interleaved(
    calls: dict[str, Callable], rounds: int, seconds: float = math.inf, report: Callable[[Times], None] | None = None
) -> Times:
    """Seconds of each call, one of each in turn, after one that is not counted: median, half the quartiles' range.

    After so many seconds no call is begun any more, and what was not counted by then is left out. `report` gets what
    there is after each round.
    """
    times: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            if begin > end:
                break
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times.setdefault(name, []).append(time.perf_counter() - begin)
            elif report is not None:
                print(f"{name}: {time.perf_counter() - begin:.1f} s at first", file=sys.stderr, flush=True)
        if report is not None:
            report(_medians(times))
    return _medians(times)


def _medians(times: dict[str, list[float]]) -> Times:
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


def networks(name: str, janspiry: Path | None, guided: Path | None) -> dict[str, Callable[[], torch.nn.Module]]:
    """What builds each implementation's network."""
    width, multipliers, blocks, attention, size, _ = NETWORKS[name]
    places = [2**i for i in range(attention, len(multipliers))]

    def theirs() -> torch.nn.Module:
        with torch.device("meta"):
            config = our_network(name).config
        shared = ("sample_size", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block")
        return UNet2DModel(
            **{key: config[key] for key in shared}, in_channels=6, attention_head_dim=64, attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        )  # fmt: skip

    def palette() -> torch.nn.Module:
        sys.path.insert(0, str(janspiry))
        return importlib.import_module("models.guided_diffusion_modules.unet").UNet(
            image_size=size, in_channel=6, inner_channel=width, out_channel=3, res_blocks=blocks, attn_res=places,
            channel_mults=multipliers, num_head_channels=64,
        )  # fmt: skip

    def adm() -> torch.nn.Module:
        sys.path.insert(0, str(guided))
        return importlib.import_module("guided_diffusion.unet").UNetModel(
            image_size=size, in_channels=6, model_channels=width, out_channels=3, num_res_blocks=blocks,
            attention_resolutions=places, channel_mult=multipliers, num_head_channels=64, use_scale_shift_norm=True,
            resblock_updown=True,
        )  # fmt: skip

    those = {"ours": lambda: our_network(name), "diffusers": theirs}
    those |= {"Janspiry": palette} if janspiry else {}
    return those | ({"guided-diffusion": adm} if guided else {})


CALLS: dict[str, Callable[..., torch.Tensor]] = {  # each with (network, y, x, gamma)
    "ours": lambda network, y, x, gamma: network(y, gamma, x).sample,
    "diffusers": lambda network, y, x, gamma: network(torch.cat([x, y], 1), gamma * 1000).sample,
    "Janspiry": lambda network, y, x, gamma: network(torch.cat([x, y], 1), gamma),
    "guided-diffusion": lambda network, y, x, gamma: network(torch.cat([x, y], 1), gamma * 1000),
}


PEAK_FLOPS = 2 * 256 * 256 * 9 * 16 * 32 * 32
MATRIX = 8192
PEAKS = {"cpu": ("convolution", PEAK_FLOPS), "cuda": ("matrix product", 2 * MATRIX**3)}


def peak(dtype: torch.dtype, device: str) -> Callable:
    """What a share of peak is counted against: a 3x3 convolution, (16, 256, 32, 32) to as many channels; on a GPU,
    which those would not fill, a product of two square matrices."""
    if device == "cuda":
        a, b = torch.randn(2, MATRIX, MATRIX, dtype=dtype).unbind()
        return lambda: a @ b
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(16, 256, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: layer(x))


def cast(network: torch.nn.Module, dtype: torch.dtype) -> Call:
    """Ours, called in its own precision."""
    return lambda y, x, gamma: network(y.to(dtype), gamma, x.to(dtype)).sample


def flops(name: str, *inputs: torch.Tensor, train: bool) -> int:
    """Of our forward pass, or with the backward pass; on the meta device, where nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.set_grad_enabled(train):
        out = our_network(name)(*(x.to("meta") for x in inputs)).sample
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
    seconds: float = math.inf,
    report: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """A row of each call; `report` gets those that there are after every round."""
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

    builders = networks(name, janspiry, guided)

    @cache
    def plain(who: str) -> tuple[torch.nn.Module, Call]:
        network = builders[who]()
        with torch.no_grad():  # the same work whether or not an output was set to zero
            for p in network.parameters():
                if not p.any():
                    p.normal_(0, 0.01)
        return network, lambda y, x, gamma: CALLS[who](network, y, x, gamma)

    def ours(
        prepare: Callable | None = None, dtype: torch.dtype = torch.float32, layout: Any = torch.channels_last
    ) -> tuple[torch.nn.Module, Call]:
        network = copy.deepcopy(plain("ours")[0]).to(dtype, memory_format=layout)
        if prepare is not None:
            prepare(network)
        return network, cast(network, dtype)

    half, single = torch.bfloat16, torch.float32
    rows: dict[tuple[str, str, str], Callable[[], Callable]] = {}  # what makes the call: only a row's own networks are
    for who in builders:
        rows["forward", who, "float32"] = lambda who=who: forward(*plain(who))
        rows["training", who, "float32"] = lambda who=who: training(*plain(who), False)
    rows["training", "ours", "bfloat16"] = lambda: training(*plain("ours"), True)
    for dtype in (single, half):
        what = str(dtype).removeprefix("torch.")
        rows["forward", "ours", what] = lambda d=dtype: forward(*ours(dtype=d, layout=torch.contiguous_format))
        rows["forward", "ours", what + LAST] = lambda d=dtype: forward(*ours(dtype=d))
        rows["training", "ours", what + LAST] = lambda d=dtype: training(*ours(use_channels_last_norms), d == half)
        rows["peak", PEAKS[device][0], what + LAST] = lambda d=dtype: peak(d, device)
    if device == "cpu":
        rows["forward", "ours", f"float32{LAST}, Winograd"] = lambda: forward(*ours(use_winograd))
    if device == "cuda":
        rows["training", "ours", f"bfloat16{LAST}, fused"] = lambda: training(*ours(use_fused_blocks), True)
        rows["training", "ours", f"bfloat16{LAST}, fused, replayed"] = lambda: replayed(*ours(use_fused_blocks))
        rows["forward", "ours", f"bfloat16{LAST}, fused"] = lambda: forward(*ours(use_fused_blocks, half))
    if compiled:
        regional = PaletteUNet2DModel.compile_repeated_blocks
        rows["training", "ours", f"bfloat16{LAST}, compiled"] = lambda: training(*ours(regional), True)
        rows["forward", "ours", f"bfloat16{LAST}, compiled"] = lambda: forward(*ours(regional, half))
    work = {what: flops(name, y, gamma, x, train=what == "training") for what in ("forward", "training")}
    work["peak"] = PEAKS[device][1]
    made = {key: row for key, row in rows.items() if not only or any(text in "|".join(key) for text in only)}

    def rows_of(times: Times) -> list[dict]:
        return [_row(key, times, name, batch, device, work) for key in made if "|".join(key) in times]

    calls = {"|".join(key): row() for key, row in made.items()}
    return rows_of(interleaved(calls, rounds, seconds, lambda times: report(rows_of(times))))


def _row(key: tuple[str, str, str], seconds: Times, name: str, batch: int, device: str, work: dict) -> dict:
    what, who, dtype = key
    median, spread = seconds["|".join(key)]
    row = {"network": name, "batch": batch, "what": what, "who": who, "dtype": dtype, "seconds": round(median, 4)}
    row |= {"spread": round(spread, 4), "GFLOP": round(work[what] / 1e9, 1)}
    row["GFLOP/s"] = round(work[what] / median / 1e9)
    fastest = seconds.get(f"peak|{PEAKS[device][0]}|{dtype.partition(',')[0]}{LAST}")
    row["share of peak"] = round(work[what] / median / (work["peak"] / fastest[0]), 3) if fastest else ""
    public = seconds.get(f"{what}|Janspiry|float32")
    if public:
        row["times as fast as Janspiry"] = round(public[0] / median, 2)
    return row


def page(result: dict) -> str:
    """All rows as one Markdown table."""
    about = ", ".join(result["machine"].values())
    if not result["rows"]:
        return f"{about}\n\nnothing was measured in the time"
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no call is begun: less rounds, or rows")
    parser.add_argument("--only", default="", help="rows with one of these: ours|bfloat16,Janspiry")
    parser.add_argument("--device", default=best_device(), help="default: the best there is")
    parser.add_argument("--compile", action="store_true", help="rows of torch.compile too (minutes)")
    parser.add_argument(
        "--output", type=output_file, default=None, help="JSON file; the page is written beside it as .md"
    )
    args = parser.parse_args()
    if unknown := set(args.networks.split(";")) - set(NETWORKS):
        parser.error(f"--networks has {'; '.join(sorted(unknown))}, expected some of {'; '.join(NETWORKS)}")
    torch.set_default_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    only = [text for text in args.only.split(",") if text]
    end = time.perf_counter() + args.minutes * 60

    def write(rows: list[dict]) -> None:
        if args.output:
            now = result | {"rows": result["rows"] + rows}
            write_text(args.output, json.dumps(now, indent=2) + "\n")
            write_text(args.output.with_suffix(".md"), page(now) + "\n")

    for name in args.networks.split(";"):
        settings = args.rounds, args.compile, args.batch, only, end - time.perf_counter()
        result["rows"] += measure(name, args.janspiry, args.guided_diffusion, *settings, write)
        write([])
    print(page(result))


if __name__ == "__main__":
    main()
