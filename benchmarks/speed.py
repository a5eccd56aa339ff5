"""Speed and memory of this machine:  python benchmarks/speed.py [--peer CHECKOUT] [--output FILE]

unet: one forward and one training step at equal configuration, ours against the public Palette implementation
(Janspiry/Palette-Image-to-Image-Diffusion-Models, whose checkout --peer names; nothing of it is in this project).
Interleaved A/B; medians over the rounds, and ratios from the same run.
sample: a 64-pixel picture by the starter at its default steps, once it is loaded (uncropping: to 96x64).
large: whole photographs of 1 to 48 megapixels, time and peak memory, each in a process of its own.
cold: `palette colorize` from the shell to the file, without anything loaded.
data: degraded samples a second on one core, of the folders that --data and --crops name.
memory: peak of a training step, with and without recomputed activations, each in a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteUNet2DModel

# base width, multipliers, blocks a level, attention from this level on, pixels, batch
NETWORKS = {
    "64 pixels, 128 wide": (128, (1, 2, 3, 4), 2, 2, 64, 4),
    "64 pixels, 64 wide": (64, (1, 2, 4, 8), 2, 3, 64, 8),
}


def machine() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        name += ", ".join(["", *[f for f in ("avx512_bf16", "amx_bf16") if f in flags]])
    except (OSError, StopIteration):
        pass
    return {"cpu": name, "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call; one of each in turn, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def networks(name: str, peer: Path | None) -> tuple[PaletteUNet2DModel, torch.nn.Module | None]:
    """Our network and the peer's, of one configuration."""
    width, multipliers, blocks, attention, size, _ = NETWORKS[name]
    levels, plain = len(multipliers), attention
    ours = PaletteUNet2DModel(
        sample_size=size,
        block_out_channels=[width * m for m in multipliers],
        down_block_types=["ResnetDownsampleBlock2D"] * plain + ["AttnDownBlock2D"] * (levels - plain),
        up_block_types=["AttnUpBlock2D"] * (levels - plain) + ["ResnetUpsampleBlock2D"] * plain,
        layers_per_block=blocks,
        attention_head_dim=64,
    )
    if peer is None:
        return ours, None
    sys.path.insert(0, str(peer))
    from models.guided_diffusion_modules.unet import UNet  # type: ignore[import-not-found]

    theirs = UNet(
        image_size=size, in_channel=6, inner_channel=width, out_channel=3, res_blocks=blocks,
        attn_res=[2**i for i in range(attention, levels)], channel_mults=multipliers, num_head_channels=64,
    )  # fmt: skip
    return ours, theirs


def unet(peer: Path | None, rounds: int) -> list[dict]:
    rows = []
    for name, (*_, size, batch) in NETWORKS.items():
        ours, theirs = networks(name, peer)
        y, x, eps = torch.randn(3, batch, 3, size, size).unbind()
        gamma = torch.rand(batch).clamp(0.01, 0.99)

        def forward(model: torch.nn.Module, dtype: torch.dtype, y: Any = y, x: Any = x, gamma: Any = gamma) -> Callable:
            def call() -> None:
                with torch.no_grad():
                    if isinstance(model, PaletteUNet2DModel):
                        model(y.to(dtype), gamma, x.to(dtype))
                    else:
                        model(torch.cat([x, y], 1), gamma)

            return call

        def training(
            model: torch.nn.Module, bf16: bool, y: Any = y, x: Any = x, gamma: Any = gamma, eps: Any = eps
        ) -> Callable:
            def call() -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    ours_ = isinstance(model, PaletteUNet2DModel)
                    output = model(y, gamma, x).sample if ours_ else model(torch.cat([x, y], 1), gamma)
                (output.float() - eps).square().mean().backward()
                model.zero_grad()

            return call

        last = PaletteUNet2DModel.from_config(ours.config).to(memory_format=torch.channels_last)
        half = PaletteUNet2DModel.from_config(ours.config).to(torch.bfloat16)
        calls = {"forward, ours float32": forward(ours, torch.float32)}
        calls["forward, ours float32 channels_last"] = forward(last, torch.float32)
        calls["forward, ours bfloat16 channels_last"] = forward(
            PaletteUNet2DModel.from_config(ours.config).to(torch.bfloat16, memory_format=torch.channels_last),
            torch.bfloat16,
        )
        calls["forward, ours bfloat16"] = forward(half, torch.bfloat16)
        calls["training, ours float32"] = training(ours, False)
        calls["training, ours bfloat16"] = training(ours, True)
        if theirs is not None:
            calls["forward, peer float32"] = forward(theirs, torch.float32)
            calls["training, peer float32"] = training(theirs, False)
        seconds = interleaved(calls, rounds)
        row = {"network": name, "batch": batch, "parameters": sum(p.numel() for p in ours.parameters())}
        row["seconds"] = {k: round(v, 4) for k, v in seconds.items()}
        if theirs is not None:
            row["peer's parameters"] = sum(p.numel() for p in theirs.parameters())
            row["times as fast"] = {
                name: round(seconds[f"{name.split(',')[0]}, peer float32"] / value, 2)
                for name, value in seconds.items()
                if "ours" in name
            }
        rows.append(row)
        print(json.dumps(row, indent=2), flush=True)
    return rows


def sample(rounds: int) -> dict:
    pipe = PalettePipeline.from_pretrained(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    from skimage import data

    photo = Image.fromarray(data.astronaut()).resize((64, 64))
    hole = np.zeros((64, 64), np.uint8)
    hole[20:40, 20:44] = 255
    jobs = {
        "colorization": {},
        "inpainting": {"mask_image": hole},
        "uncropping": {"right": 0.5},
        "jpeg_restoration": {},
    }
    calls = {task: (lambda task=task, extra=extra: pipe(photo, task=task, **extra)) for task, extra in jobs.items()}
    row = {"steps": pipe.config.default_steps, "seconds": interleaved(calls, rounds)}
    row["seconds"] = {k: round(v, 3) for k, v in row["seconds"].items()}
    print(json.dumps(row), flush=True)
    return row


LARGE = (("colorization", 12), ("colorization", 48), ("inpainting", 12), ("uncropping", 1), ("jpeg_restoration", 1))


def large() -> list[dict]:
    """Each in a process of its own, since peak memory is a process's. The hole is 10% of one megapixel."""
    code = """
import os, resource, sys, time, torch, numpy as np
from PIL import Image
from skimage import data
from palette_diffusers import PalettePipeline
task, megapixels = sys.argv[1], float(sys.argv[2])
width, height = round((megapixels * 4 / 3 * 1e6) ** 0.5), round((megapixels * 3 / 4 * 1e6) ** 0.5)
photo = Image.fromarray(data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)
extra = {}
if task == "inpainting":
    mask = np.zeros((height, width), np.uint8)
    mask[400:600, 300:800] = 255
    extra = {"mask_image": mask}
elif task == "uncropping":
    extra = {"right": 0.25}
pipe = PalettePipeline.from_pretrained(dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
pipe(photo.resize((64, 64)))
begin = time.perf_counter()
pipe(photo, task=task, **extra)
seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if os.path.exists("/proc/self/status"):  # ru_maxrss is inherited from the parent on Linux
    peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(seconds, peak / 2**20)
"""
    rows = []
    for task, megapixels in LARGE:
        seconds, peak = map(float, _run([sys.executable, "-c", code, task, str(megapixels)]).split()[-2:])
        rows.append({"task": task, "megapixels": megapixels, "seconds": round(seconds, 1), "peak GiB": round(peak, 2)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def cold(rounds: int) -> dict:
    from skimage import data

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photo.png")
        Image.fromarray(data.astronaut()).convert("L").save(source)
        command = [sys.executable, "-m", "palette_diffusers.cli", "colorize", str(source), "-o", f"{folder}/out.png"]
        times = interleaved({"colorize": lambda: _run(command)}, rounds)
        times |= interleaved(
            {"--help": lambda: _run([sys.executable, "-m", "palette_diffusers.cli", "--help"])}, rounds
        )
    row = {"seconds": {k: round(v, 2) for k, v in times.items()}}
    print(json.dumps(row), flush=True)
    return row


def data(path: str | None, crops: str, rounds: int) -> dict:
    from palette_diffusers.settings import parse
    from palette_diffusers.training import _dataset, make_scheduler

    if not path:
        raise SystemExit("error: the part data needs --data, a folder of images")
    settings = parse(["--preset", "starter-64", "--data", path, "--crops", crops])
    samples = _dataset(settings, make_scheduler(settings), holes=True)
    torch.set_num_threads(1)
    position = iter(range(10**9))
    calls = {"500 samples": lambda: [samples[next(position)] for _ in range(500)]}
    row = {"samples a second on one core": round(500 / interleaved(calls, rounds)["500 samples"])}
    print(json.dumps(row), flush=True)
    return row


def training_peak(kind: str) -> float:
    """GiB of this process after two training steps at batch 16."""
    unet, _ = networks("64 pixels, 128 wide", None)
    unet.train()
    if kind == "recomputed":
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters())
    for _ in range(2):
        y, x, eps = torch.randn(3, 16, 3, 64, 64).unbind()
        (unet(y, torch.rand(16), x).sample - eps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def memory() -> dict:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed; "
    peaks = {
        kind: float(_run([sys.executable, "-c", code + f"print(speed.training_peak({kind!r}))"]))
        for kind in ("kept", "recomputed")
    }
    ratio = round(peaks["recomputed"] / peaks["kept"], 2)
    row = {"peak GiB": {kind: round(peak, 2) for kind, peak in peaks.items()}, "ratio": ratio}
    print(json.dumps(row), flush=True)
    return row


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=None, help="checkout of the public Palette implementation")
    parser.add_argument("--data", default=None, help="images for the part data, as train_palette.py takes them")
    parser.add_argument("--crops", default="", help="full-size photographs for it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="unet,sample,large,cold", help="which parts, comma-separated")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    parts = {
        "unet": lambda: unet(args.peer, args.rounds),
        "sample": lambda: sample(args.rounds),
        "large": large,
        "cold": lambda: cold(max(3, args.rounds // 3)),
        "data": lambda: data(args.data, args.crops, args.rounds),
        "memory": memory,
    }
    unknown = set(args.only.split(",")) - set(parts)
    if unknown:
        parser.error(f"--only is {args.only!r}, expected some of {', '.join(parts)}")
    result = {"machine": machine()} | {name: parts[name]() for name in args.only.split(",")}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
