"""What is trained for the claims: a preset of the package for each run, in stages, so that a run is measured on its
way; the GAN by a loop of its own."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from palette_diffusers.machine import best_device, best_dtype
from palette_diffusers.training import TrainSettings, preset, train

from . import gan

STAGES = 4  # a run is measured after each; the learning rate falls in the last one
TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")
PRECISIONS = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "no"}


@dataclass(frozen=True)
class Run:
    """A preset with changes; `share` of the steps that the others take; `specialist`: the task it stands for."""

    preset: str
    changes: dict[str, Any]
    share: float = 1.0
    adversarial: bool = False
    specialist: str = ""


# name                              preset                  changes
RUNS = {
    "diffusion":              Run("tiny-64",              {}),
    "regression":             Run("tiny-64-regression",   {}),
    "GAN":                    Run("tiny-64",              {}, adversarial=True),
    "diffusion, L1":          Run("tiny-64-l1",           {}),
    "diffusion, no attention": Run("tiny-64-no-attention", {}),
    **{f"specialist, {task}": Run("tiny-64", {"tasks": task, "loss_weights": ""}, 1 / len(TASKS), specialist=task)
       for task in TASKS},
}  # fmt: skip


@dataclass(frozen=True)
class Length:
    """How long runs are trained: the same for all, but for a specialist's share of the steps."""

    steps: int
    batch: int = 16
    workers: int = 1

    def stages(self, run: Run) -> list[int]:
        """The steps at which a run is measured; the last is its end."""
        steps = max(STAGES, round(self.steps * run.share))
        return [steps * k // STAGES for k in range(1, STAGES + 1)]


def settings_of(run: Run, data: str, folder: Path, seed: int, length: Length, **changes: Any) -> TrainSettings:
    """The package's settings of a run."""
    device = best_device()
    fixed = dict(
        data=data, output=str(folder), seed=seed, batch=length.batch, workers=length.workers, validate_every=0,
        save_every=100, log_every=10, precision=PRECISIONS[str(best_dtype(device))], tracker="none", resume=True,
    )  # fmt: skip
    return replace(preset(run.preset), **(fixed | run.changes | changes))


def checkpoint(folder: Path, step: int) -> Path:
    """The pipeline of a run as it was after so many steps."""
    return folder / f"pipeline-{step:07d}"


def train_run(name: str, data: str, folder: Path, seed: int, length: Length, **changes: Any) -> None:
    """Trains a run to its end, from wherever it was left; every stage leaves a pipeline.

    Raises:
        KeyboardInterrupt: it was told to stop, and has saved.
    """
    run = RUNS[name]
    stages = length.stages(run)
    for stage in stages:
        if checkpoint(folder, stage).is_dir():
            continue
        decay = stages[-1] - stages[-2] if stage == stages[-1] else 0
        settings = settings_of(run, data, folder, seed, length, steps=stage, decay=decay, **changes)
        (gan.train if run.adversarial else train)(settings)
        if not (folder / f"step-{stage:07d}.pt").is_file():
            raise KeyboardInterrupt(f"{name} was stopped before step {stage}; the same command goes on")
        part = checkpoint(folder, stage).with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder / "pipeline", part)
        os.replace(part, checkpoint(folder, stage))
        (folder / "run.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
