"""Few-step students: a teacher's pairs of noise and picture, which the student learns to join by straight lines.

Rectified flow (Liu et al. 2023, "Flow Straight and Fast", their reflow) in the variance-preserving form of this
package: the loss stays the one of training, and only the pair changes. Where noise and picture are drawn apart, a
network learns the mean of all pictures that a noisy one may come from; where the picture is the one that a teacher
makes of this very noise, there is but one, and a single step reaches it. One student serves 1, 2 and 4 steps, and any
solver, since every point of a line is trained. Images are (B, 3, H, W), RGB, [-1, 1].
"""

from typing import Any

import torch

from .pipeline import PalettePipeline
from .scheduler import PaletteScheduler
from .sizes import Predict
from .tasks import Given, get_task

LOGSNR_MAX = 9.0  # of the levels that are trained


class Start:
    """A network that remembers where a sampling began: `sample` (B, 3, H, W) and its `gamma`."""

    def __init__(self, predict: Predict):
        self.predict = predict
        self.sample: torch.Tensor | None = None

    def __call__(self, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if self.sample is None:
            self.sample, self.gamma = sample, gamma
        return self.predict(sample, gamma, condition)


class Teacher:
    """Makes pairs of a batch of `PaletteDataset`, by a pipeline that samples without noise of its own.

    Args:
        pipe: the teacher; its scheduler's settings hold, but for `sampling_variance`, which is "zero" here.
        tasks: the names of the batch's tasks, in the order of their numbers.
        steps: its network evaluations a picture; 0 takes its default.
        levels: noise levels at which each pair is trained; the first is where the teacher began.
        predict: computes the teacher's network, in place of the pipeline's own way.

    Raises:
        ValueError: a task that the teacher does not know.
    """

    def __init__(
        self, pipe: PalettePipeline, tasks: list[str], steps: int = 0, levels: int = 4, predict: Predict | None = None
    ):
        unknown = [task for task in tasks if task not in pipe.config.tasks]
        if unknown:
            raise ValueError(f"tasks has {', '.join(unknown)}, the teacher knows {', '.join(pipe.config.tasks)}")
        self.pipe, self.levels, self.predict = pipe, levels, predict or pipe._predict
        self.tasks = [get_task(task) for task in tasks]
        self.steps = steps or pipe.config.default_steps
        # the student's own sampling will even chroma out
        settings = dict(sampling_variance="zero", chroma_guidance=0.0)
        pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config, **settings)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.requires_grad_(False).eval()

    def pairs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of B samples => one of B x `levels`: `clean` is the teacher's picture, and `noise` what lies on the
        line through it and the teacher's first sample; `gamma` is that first sample's level, then drawn evenly in
        log-SNR between it and `LOGSNR_MAX`."""
        clean, noise, first = batch["clean"].clone(), batch["noise"].clone(), batch["gamma"].clone()
        for number, task in enumerate(self.tasks):
            rows = torch.nonzero(batch["task"] == number).flatten()
            if len(rows):
                clean[rows], noise[rows], first[rows] = self._pair(batch, rows, task)
        pairs = {name: batch[name] for name in ("condition", "mask", "task")} | {"clean": clean, "noise": noise}
        many = {name: value.repeat_interleave(self.levels, 0) for name, value in pairs.items()}
        low = torch.logit(first.double()).repeat_interleave(self.levels)
        share = torch.rand_like(low)
        share[:: self.levels] = 0
        logsnr = torch.lerp(low, low.clamp_min(LOGSNR_MAX), share)
        return batch | many | {"gamma": torch.sigmoid(logsnr).float()}

    def _pair(self, batch: dict[str, torch.Tensor], rows: torch.Tensor, task: Any) -> tuple[torch.Tensor, ...]:
        """The teacher's pictures of some rows, the noise of their lines, and the level they begin at."""
        known, condition = batch["known"][rows], batch["condition"][rows, :3]
        given = Given(known=known, condition=condition, mask=batch["mask"][rows] if task.takes_mask else None)
        start, latents = Start(self.predict), batch["noise"][rows]
        picture = self.pipe.denoise(given, num_inference_steps=self.steps, latents=latents, predict=start, task=task)
        assert start.sample is not None
        gamma = start.gamma.to(picture.device)
        noise = (start.sample - gamma.sqrt() * picture) / (1 - gamma).sqrt()
        return picture, noise, gamma.expand(len(rows))
