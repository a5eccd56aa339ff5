"""JPEG restoration of whole photographs, with and without holding it to the file's coefficients:

    python benchmarks/jpeg.py --data PATH/TO/bsds500 --count 10 --output benchmarks/results/jpeg.json

Photographs of the end of the data, which the starter was not trained on. PSNR (RGB) and PSNR-B (luma; Yim & Bovik 2011)
in dB, larger is better; distance: of the classifier's features, the mean over 64-pixel patches, smaller is better.
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from classifier import load_classifier
from peers import machine, numbers, output_file
from PIL import Image

from palette_diffusers import PalettePipeline, canvas
from palette_diffusers.coefficients import read_coefficients
from palette_diffusers.color import luma

KINDS = ("jpeg", "model", "held")  # held: to the coefficients


def patches(images: torch.Tensor, stride: int) -> torch.Tensor:
    """Of 64 pixels, from images (B, 3, H, W): (N, 3, 64, 64)."""
    return images.unfold(2, 64, stride).unfold(3, 64, stride).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)


def distance(features: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two photographs (1, 3, H, W)."""
    with torch.no_grad():
        first, second = (features.features(patches(x, 48)) for x in (a, b))
    return (first - second).norm(dim=1).mean().item()


def psnr(image: torch.Tensor, clean: torch.Tensor, more: float = 0.0) -> float:
    return -10 * math.log10(((image - clean) / 2).square().mean().item() + more)


def blocked_effect(light: torch.Tensor) -> float:
    """How much steeper luma (1, 1, H, W) is across the borders of 8x8 blocks than elsewhere, in [0, 1] squared."""
    steps = [(light / 2).diff(dim=dim).square().movedim(dim, 0) for dim in (-1, -2)]
    borders = [torch.arange(len(s)) % 8 == 7 for s in steps]
    at, between = (
        torch.cat([s[b if kind else ~b].flatten() for s, b in zip(steps, borders, strict=True)]).mean().item()
        for kind in (True, False)
    )
    return math.log2(8) / math.log2(min(light.shape[-2:])) * max(0.0, at - between)


def compare(features: torch.nn.Module, image: torch.Tensor, clean: torch.Tensor) -> dict[str, float]:
    light, clean_light = luma(image), luma(clean)
    return {
        "PSNR": psnr(image, clean),
        "PSNR-B": psnr(light, clean_light, blocked_effect(light)),
        "distance": distance(features, image, clean),
    }


def restore(pipe: PalettePipeline, features: torch.nn.Module, photo: Image.Image, quality: int, folder: Path) -> dict:
    """One photograph => kind => figure => number."""
    path = folder / "photo.jpg"
    photo.save(path, quality=quality)
    free = pipe(
        path, task="jpeg_restoration", consistent=False, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    held = read_coefficients(path).smooth(free)  # what the pipeline ends with, of the same sample
    pictures = zip(KINDS, (canvas.read(path).image, free, held), strict=True)
    clean = canvas.read(photo).image
    return {kind: compare(features, picture, clean) for kind, picture in pictures}


def summary(rows: dict[str, dict]) -> dict:
    """name => kind => figure => number: medians, the median of the photographs' gains, how many got worse than their
    JPEG, and the five whose restoration gained least, with their gains (larger is better)."""
    figures = {"PSNR": 1, "PSNR-B": 1, "distance": -1}
    median = {kind: {f: float(np.median([r[kind][f] for r in rows.values()])) for f in figures} for kind in KINDS}
    median = {kind: {f: round(value, 3) for f, value in row.items()} for kind, row in median.items()}
    gains: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS[1:]}
    for kind, f in itertools.product(KINDS[1:], figures):
        gains[kind][f] = {n: round(figures[f] * (r[kind][f] - r["jpeg"][f]), 3) for n, r in rows.items()}
    return {
        "median": median,
        "median gain": {
            kind: {f: float(np.median([*each.values()])) for f, each in gains[kind].items()} for kind in gains
        },
        "worse": {kind: {f: sum(g < 0 for g in each.values()) for f, each in gains[kind].items()} for kind in gains},
        "least gain": {
            kind: {f: dict(sorted(each.items(), key=lambda item: item[1])[:5]) for f, each in gains[kind].items()}
            for kind in gains
        },
    }


def options(text: str | None, dtype: str = "float32") -> argparse.ArgumentParser:
    """Those of benchmarks on whole photographs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of parquet with the columns image and name")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=output_file, default=None, help="JSON file")
    return parser


def prepared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[datasets.Dataset, PalettePipeline]:
    """The last photographs of the data, and the pipeline."""
    files = {"train": f"{args.data}/*.parquet"}
    photographs = datasets.load_dataset("parquet", data_files=files, split="train")
    if not 1 <= args.count <= len(photographs):
        parser.error(f"--count is {args.count}, expected 1 to {len(photographs)}, the photographs of {args.data}")
    pipe = PalettePipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    return photographs.select(range(len(photographs) - args.count, len(photographs))), pipe


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--qualities", type=numbers, default=[5, 10, 20], help="with commas")
    args = parser.parse_args()
    photographs, pipe = prepared(parser, args)
    features, result = load_classifier(), {"machine": machine(), "photographs": args.count, "quality": {}}
    with tempfile.TemporaryDirectory() as folder:
        for quality in args.qualities:
            rows = {p["name"]: restore(pipe, features, p["image"].convert("RGB"), quality, Path(folder))
                    for p in photographs}  # fmt: skip
            result["quality"][quality] = summary(rows)
            print(quality, json.dumps(result["quality"][quality]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
