"""Speed and memory of this machine:  python benchmarks/speed.py [--output FILE]

The networks against the peers' are in peers.py.
sample: a 64-pixel picture by the starter, balanced and fast, once it is loaded (uncropping: to 96x64).
large: whole photographs of 1 to 48 megapixels, time and peak memory, each in a process of its own.
cold: `palette colorize` from the shell to the file, without anything loaded.
data: degraded samples a second on one core, of the folders that --data and --crops name, in the first epoch and in
    later ones, when photographs of the very size are decoded.
memory: peak of a training step, with and without recomputed activations, each in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from peers import interleaved, machine, our_network, output_file, peak_memory
from PIL import Image

from palette_diffusers import PalettePipeline
from palette_diffusers.cli import _load


def load(speed: str) -> PalettePipeline:
    """The command line's, on a CPU that multiplies in bfloat16."""
    pipe = _load(None, "cpu", "bfloat16", speed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(rounds: int) -> dict:
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
    pipes = {speed: load(speed) for speed in SPEEDS}
    calls = {
        f"{task}, {speed}": (lambda pipe=pipe, task=task, extra=extra: pipe(photo, task=task, **extra))
        for task, extra in jobs.items()
        for speed, pipe in pipes.items()
    }
    row = {"steps": {speed: pipe.config.default_steps for speed, pipe in pipes.items()}}
    row["seconds"] = {k: round(v, 3) for k, (v, _) in interleaved(calls, rounds).items()}
    print(json.dumps(row), flush=True)
    return row


LARGE = (("colorization", 12), ("colorization", 48), ("inpainting", 12), ("uncropping", 1), ("jpeg_restoration", 1))
SPEEDS = ("balanced", "fast")


def large() -> list[dict]:
    """Each in a process of its own, since peak memory is a process's. The hole is 10% of one megapixel."""
    code = """
import sys, time, numpy as np
from PIL import Image
from skimage import data
sys.path.insert(0, sys.argv[4])
from speed import load, peak_memory
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
pipe = load(sys.argv[3])
pipe(photo.resize((64, 64)))
begin = time.perf_counter()
pipe(photo, task=task, **extra)
print(time.perf_counter() - begin, peak_memory())
"""
    rows = []
    for (task, megapixels), speed in product(LARGE, SPEEDS):
        command = [sys.executable, "-c", code, task, str(megapixels), speed, str(Path(__file__).parent)]
        seconds, peak = map(float, _run(command).split()[-2:])
        row = {"task": task, "megapixels": megapixels, "speed": speed}
        rows.append(row | {"seconds": round(seconds, 1), "peak GiB": round(peak, 2)})
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
    row = {"seconds": {k: round(v, 2) for k, (v, _) in times.items()}}
    print(json.dumps(row), flush=True)
    return row


def data(path: str, crops: str, rounds: int) -> dict:
    from palette_diffusers.settings import parse
    from palette_diffusers.training import _dataset, make_scheduler

    settings = parse(["--preset", "starter-64", "--data", path, "--crops", crops])
    samples = _dataset(settings, make_scheduler(settings), holes=True)
    torch.set_num_threads(1)
    position, row = iter(range(10**9)), {}
    calls = {"500 samples": lambda: [samples[next(position)] for _ in range(500)]}
    for epoch in ("first", "later"):
        if epoch == "later":
            for number in range(len(samples)):  # what an epoch decodes
                samples._photos(number, np.random.default_rng(0))
        speed = 500 / interleaved(calls, rounds)["500 samples"][0]
        row[f"samples a second on one core, {epoch} epoch"] = round(speed)
    print(json.dumps(row), flush=True)
    return row


def training_peak(kind: str) -> float:
    """GiB of this process after two training steps at batch 16."""
    unet = our_network("64 pixels, 128 wide")
    unet.train()
    if kind == "recomputed":
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters())
    for _ in range(2):
        y, x, eps = torch.randn(3, 16, 3, 64, 64).unbind()
        (unet(y, torch.rand(16), x).sample - eps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak_memory()


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
    parser.add_argument("--data", default=None, help="images for the part data, as train_palette.py takes them")
    parser.add_argument("--crops", default="", help="full-size photographs for it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="sample,large,cold", help="which parts, comma-separated")
    parser.add_argument("--output", type=output_file, default=None, help="JSON file")
    args = parser.parse_args()
    parts = {
        "sample": lambda: sample(args.rounds),
        "large": large,
        "cold": lambda: cold(max(3, args.rounds // 3)),
        "data": lambda: data(args.data, args.crops, args.rounds),
        "memory": memory,
    }
    if unknown := set(args.only.split(",")) - set(parts):
        parser.error(f"--only has {', '.join(sorted(unknown))}, expected some of {', '.join(parts)}")
    if "data" in args.only.split(",") and not args.data:
        parser.error("--only has data, which needs --data: expected a folder of images")
    result = {"machine": machine()} | {name: parts[name]() for name in args.only.split(",")}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
