"""The runs, measured by the package's own evaluation, on the same degraded photographs."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from palette_diffusers import PalettePipeline
from palette_diffusers.evaluation import Photographs, evaluate
from palette_diffusers.evaluation.features import FeatureNetwork
from palette_diffusers.evaluation.restorers import Restorer, from_pipeline
from palette_diffusers.machine import best_device, best_dtype
from palette_diffusers.report import read_log

from .runs import RUNS, Scale, checkpoint, stages_of

VARIANTS = (
    "colorization", "inpainting", "uncropping", "jpeg_restoration:5", "jpeg_restoration:10", "jpeg_restoration:20",
)  # fmt: skip
STAGE_VARIANTS = ("colorization", "uncropping", "jpeg_restoration:5")
FIGURES = ("frechet", "accuracy", "distance", "psnr", "ssim", "ms_ssim", "spread")
STEPS = 10  # of sampling; a GAN and a regression take one
SAMPLES = 2  # of each of the first photographs, for diversity


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name} {seed}"


def row_name(name: str, seed: int) -> str:
    """The specialists share a row: each has its own tasks."""
    return f"{'specialist' if RUNS[name].specialist else name} {seed}"


def facts(name: str, seed: int, folder: Path, scale: Scale) -> dict[str, Any]:
    """What was trained, for how long, and how steadily: after the first quarter, the highest logged loss over the
    median; of a GAN the mean of its discriminator's loss (log 4 = 1.39 is a discriminator that tells nothing) and the
    share of patches that fooled it."""
    step, here = scale.stages(RUNS[name])[-1], run_folder(folder, name, seed)
    unet = PalettePipeline.from_pretrained(checkpoint(here, step)).unet
    every = json.loads((here / "settings.json").read_text())["log_every"] * scale.batch
    log = [line for line in read_log(here / "log.jsonl") if line["step"] <= step]
    late = log[len(log) // 4 :]
    steady = {}
    if late:  # a run of fewer steps than a line of the log takes has none
        losses = [line["loss"] for line in late]
        steady = {"worst_loss": round(max(losses) / statistics.median(losses), 2)}
        of_judge = [key for key in ("judge", "fooled") if key in late[0]]
        steady |= {key: round(statistics.mean(line[key] for line in late), 2) for key in of_judge}
    return {
        "run": name,
        "seed": seed,
        "steps": step,
        "samples": step * scale.batch,
        "seconds": round(sum(every / line["samples_per_second"] for line in log)),
        "parameters": sum(p.numel() for p in unet.parameters()),
        **steady,
    }


class Bench:
    """Photographs, the network that measures them, and a folder where what was measured is kept."""

    def __init__(self, folder: Path, scale: Scale, photographs: Photographs, features: FeatureNetwork):
        self.folder, self.scale, self.photographs, self.features = folder, scale, photographs, features

    def restorer(self, run: str, seed: int, step: int, row: str) -> Restorer:
        """A run as it was after so many steps."""
        device = best_device()
        path = checkpoint(run_folder(self.folder, run, seed), step)
        pipe = PalettePipeline.from_pretrained(path, dtype=best_dtype(device)).to(device)
        return from_pipeline(pipe, row, min(pipe.config.default_steps, STEPS), {"trained": step})

    def ends(self, names: Iterable[str], seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Every run at its end, on every task that it knows."""
        place = f"steps-{self.scale.steps}-count-{len(self.photographs)}"
        runs = [
            (self.restorer(name, seed, self.scale.stages(RUNS[name])[-1], row_name(name, seed)), RUNS[name].specialist)
            for seed in seeds
            for name in names
        ]
        rows = []
        for variant in VARIANTS:
            rows += self._rows(place, [one for one, only in runs if variant.startswith(only)], variant, SAMPLES)
        return rows

    def stages(self, names: Iterable[str], seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Every run at the end of each of its stages, on a few tasks."""
        runs = [
            {"run": name, "seed": seed, "step": step}
            for seed in seeds
            for name in names
            for step in stages_of(run_folder(self.folder, name, seed))
        ]
        several = [self.restorer(**run, row="{run} {seed} at {step}".format(**run)) for run in runs]
        rows = []
        for variant in STAGE_VARIANTS if runs else ():
            found = self._rows(f"stages-count-{len(self.photographs)}", several, variant, 1)
            rows += [row | run for row, run in zip(found, runs, strict=True)]
        return rows

    def _rows(self, place: str, several: list[Restorer], variant: str, samples: int) -> list[dict[str, Any]]:
        """A row for each of them, in their order."""
        results = evaluate(
            several, self.photographs, [variant], self.features, self.folder / place, samples=samples,
            batch=min(50, len(self.photographs)),
        )  # fmt: skip
        assert results is not None
        found = {row["images"]: row for row in results["rows"] if row["task"] == variant}
        return [
            {"task": variant, "images": one.name, **{k: found[one.name][k] for k in FIGURES if k in found[one.name]}}
            for one in several
        ]
