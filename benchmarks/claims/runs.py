"""What is trained for the claims: a preset of the package for each run, in stages, so that a run is measured on its
way; the GAN by a loop of its own."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from palette_diffusers.files import new_folder
from palette_diffusers.machine import best_device, best_dtype
from palette_diffusers.training import TrainSettings, preset, train

from . import gan

TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}


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
class Scale:
    """What is the same for all runs, but for a specialist's share of the steps; `network` changes the presets'."""

    steps: int
    batch: int = 16
    size: int = 64
    network: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    parts: int = 4  # the learning rate falls in the last

    def stages(self, run: Run) -> list[int]:
        """The steps at which a run is measured; the last is its end."""
        steps = max(self.parts, round(self.steps * run.share))
        return [steps * k // self.parts for k in range(1, self.parts + 1)]


def settings_of(run: Run, data: str, folder: Path, seed: int, scale: Scale, **changes: Any) -> TrainSettings:
    """The package's settings of a run."""
    base = preset(run.preset)
    fixed = dict(
        data=data, output=str(folder), seed=seed, batch=scale.batch, workers=scale.workers, validate_every=0,
        save_every=100, log_every=10, precision=PRECISIONS[best_dtype(best_device())], tracker="none", resume=True,
        size=scale.size, unet=base.unet | scale.network,
    )  # fmt: skip
    return replace(base, **(fixed | run.changes | changes))


def checkpoint(folder: Path, step: int) -> Path:
    """The pipeline of a run as it was after so many steps."""
    return folder / f"pipeline-{step:07d}"


def stages_of(folder: Path) -> list[int]:
    """The steps whose pipelines a run has kept."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("pipeline-*") if not path.suffix)


def train_run(name: str, data: str, folder: Path, seed: int, scale: Scale) -> None:
    """Trains a run to its end, from wherever it was left; every stage leaves a pipeline.

    Raises:
        KeyboardInterrupt: it was told to stop, and has saved. ValueError: it was trained for longer.
    """
    run = RUNS[name]
    stages = scale.stages(run)
    for stage in stages:
        trained = max((int(path.stem.partition("-")[2]) for path in folder.glob("step-*.pt")), default=0)
        if checkpoint(folder, stage).is_dir() or (trained > stage != stages[-1]):
            continue
        if trained > stage:
            raise ValueError(f"{folder} holds a run of {trained} steps, {stage} were asked for: name another folder")
        decay = -(-stage // scale.parts) if stage == stages[-1] else 0
        settings = settings_of(run, data, folder, seed, scale, steps=stage, decay=decay)
        (gan.train if run.adversarial else train)(settings)
        if not (folder / f"step-{stage:07d}.pt").is_file():
            raise KeyboardInterrupt(f"{name} was stopped before step {stage}; the same command goes on")
        with new_folder(checkpoint(folder, stage)) as part:
            shutil.copytree(folder / "pipeline", part, dirs_exist_ok=True)
