"""Quality of a checkpoint on validation photographs, by the small classifier's features.

    python benchmarks/quality.py --data PATH/TO/tiny-imagenet --count 2000

For every task: the Fréchet distance between the classifier's features of the results and of the originals
("FD-classifier", never FID), its accuracy, and PSNR beside them; for the degraded input, OpenCV's Telea
inpainting where it is installed, and the model.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from classifier import load_classifier, read

from palette_diffusers import PalettePipeline, get_task
from palette_diffusers.masks import free_form_mask
from palette_diffusers.tasks import Given, jpeg

TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features (N, D), in float64 (Heusel et al. 2017, equation 6).

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(frechet_distance(x, x)) < 1e-6, round(frechet_distance(x, x + 1), 3)
    (True, 4.0)
    """
    a, b = a.double(), b.double()
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T))
    trace = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product.real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace).item()


def degrade(task: str, clean: torch.Tensor, index: int) -> Given:
    """The benchmark's source of photograph `index`: free-form holes of 20-30%, JPEG at quality 10."""
    generator = torch.Generator().manual_seed(1_000_003 + index)  # not that of sampling
    if task == "inpainting":
        mask = free_form_mask(*clean.shape[-2:], generator, area=(0.2, 0.3))[None]
        return get_task(task).prepare(clean, mask, generator)
    if task == "jpeg_restoration":
        return get_task(task).prepare(jpeg(clean, 10))
    return get_task(task).degrade(clean, generator)


def telea(known: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    try:
        import cv2
    except ImportError:
        return None
    out = []
    for image, hole in zip(known, mask, strict=True):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().copy()
        filled = cv2.inpaint(pixels, hole[0].byte().numpy().copy() * 255, 3, cv2.INPAINT_TELEA)
        out.append(torch.from_numpy(filled).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(out)


class Measure:
    """Features, hits and errors of one set of results."""

    def __init__(self) -> None:
        self.features: list[torch.Tensor] = []
        self.hits = 0
        self.psnr: list[float] = []

    @torch.no_grad()
    def add(self, model, images: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor) -> None:
        images = (((images + 1) * 127.5).round().clamp(0, 255)) / 127.5 - 1
        features = model.features(images)
        self.features.append(features)
        self.hits += (model.head(features).argmax(1) == labels).sum().item()
        error = ((images - clean) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
        self.psnr += (-10 * error.log10()).tolist()

    def row(self, reference: "Measure") -> dict[str, float]:
        return {
            "FD-classifier": round(frechet_distance(torch.cat(self.features), torch.cat(reference.features)), 3),
            "accuracy": round(self.hits / len(self.psnr), 4),
            "PSNR": round(float(np.median(self.psnr)), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with validation-*.parquet")
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--solver", default=None, help="a diffusers scheduler's class; default: the checkpoint's")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: changes of the scheduler's configuration")
    parser.add_argument("--start", type=float, default=None, help="log-SNR to start from the source at; an experiment")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()

    import diffusers

    pipe = PalettePipeline.from_pretrained(args.model)
    pipe.unet.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    solver = getattr(diffusers, args.solver) if args.solver else type(pipe.scheduler)
    pipe.scheduler = solver.from_config(pipe.scheduler.config, **args.config)
    model = load_classifier()
    images, labels = read(args.data, "validation")
    images, labels = images[: args.count], labels[: args.count]
    result: dict[str, dict] = {}
    original = Measure()
    for i in range(0, len(images), args.batch):
        clean = images[i : i + args.batch].float() / 127.5 - 1
        original.add(model, clean, clean, labels[i : i + args.batch])
    result["originals"] = {"originals": original.row(original)}
    for task in args.tasks.split(","):
        chosen = copy.copy(get_task(task))
        if args.start is not None:
            chosen.start = args.start
        rows = {"degraded": Measure(), "Telea": Measure(), "Palette": Measure()}
        begin = time.time()
        for i in range(0, len(images), args.batch):
            clean, label = images[i : i + args.batch].float() / 127.5 - 1, labels[i : i + args.batch]
            single = [degrade(task, one[None], i + k) for k, one in enumerate(clean)]
            given = Given.cat(single)
            rows["degraded"].add(model, given.known, clean, label)
            if given.mask is not None:
                filled = telea(given.known, given.mask)
                if filled is not None:
                    rows["Telea"].add(model, filled, clean, label)
            generators = [torch.Generator().manual_seed(i + k) for k in range(len(clean))]
            sample = pipe.denoise(given, generators, args.steps, task=chosen)
            rows["Palette"].add(model, chosen.compose(sample, given), clean, label)
        result[task] = {name: m.row(original) for name, m in rows.items() if m.psnr}
        result[task]["seconds"] = round(time.time() - begin)
        print(task, json.dumps(result[task]), flush=True)
    print(f"\n{len(images)} photographs, {type(pipe.scheduler).__name__}\n")
    print("| task | images | FD-classifier | accuracy | PSNR (median, dB) |\n| --- | --- | --- | --- | --- |")
    for task, rows in result.items():
        for name, row in rows.items():
            if isinstance(row, dict):
                print(f"| {task} | {name} | {row['FD-classifier']} | {row['accuracy']:.1%} | {row['PSNR']} |")
    if args.output:
        args.output.write_text(json.dumps({"count": len(images), "results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
