"""Few-step students: a teacher's pairs of noise and picture, which the student learns to join by straight lines.

Rectified flow (Liu et al. 2023, "Flow Straight and Fast", their reflow) in the variance-preserving form of this
package: the loss stays the one of training, and only the pair changes. Where noise and picture are drawn apart, a
network learns the mean of all pictures that a noisy one may come from; where the picture is the one that a teacher
makes of this very noise, there is but one, and a single step reaches it. One student serves 1, 2 and 4 steps, and any
solver, since every point of a line is trained.

A student's first step is softer than its teacher's picture, and what it sees next does not lie on that line: it was
taught to keep what is there, and stays soft. So some lines begin where the student's own steps have led it, and end at
the picture that the teacher makes from there (on-policy distillation: DAgger, Ross et al. 2011; Agarwal et al. 2024,
"On-Policy Distillation of Language Models").

A teacher can be better than its weights: led away from what a worse version of it predicts (`guided`), it leaves out
the pictures that both only half believe in, and their haze. What it predicts then can be learnt level by level
(`Teacher.predictions`), so that a step costs one evaluation again (guidance distillation, the first stage of Meng et
al. 2023, "On Distillation of Guided Diffusion Models"). Images are (B, 3, H, W), RGB, [-1, 1].
"""

import copy
import math
from typing import Any

import numpy as np
import torch

from .pipeline import FAR, PalettePipeline
from .scheduler import PaletteScheduler, diffuse, output_for, predicted_original
from .sizes import Predict
from .tasks import Given, fill_holes, get_task

LOGSNR_MAX = 9.0  # of the levels that are trained
LOGSNR_LAST = 6.0  # the noisiest level that a student's last step may be at
LAST_SHARE = 0.25  # how often that step is trained, of how often each other is: little is left to learn there


class Reached(Exception):
    """A sampling is where it was to go."""


class Start:
    """A network that remembers where its part of a sampling began, `sample` (B, 3, H, W) and its `gamma`: at once, or
    after so many evaluations of another. With `ends`, the sampling is ended there, by `Reached`."""

    ends = False

    def __init__(self, predict: Predict, before: Predict | None = None, evaluations: int = 0):
        self.predict, self.before, self.left = predict, before or predict, evaluations
        self.sample: torch.Tensor | None = None

    def __call__(self, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left >= 0:
            return self.before(sample, gamma, condition)
        if self.sample is None:
            self.sample, self.gamma = sample, gamma
            if self.ends:
                raise Reached
        return self.predict(sample, gamma, condition)


def guided(predict: Predict, guide: Predict, guidance: float, between: tuple[float, float]) -> Predict:
    """Autoguidance: predictions that lead away from those of a worse network of the same kind.

    Args:
        predict, guide: compute the networks, which predict the same thing (noise, the velocity or the picture).
        guidance: w of guide + w (prediction - guide); 1 leaves the prediction as it is.
        between: the lowest and the highest log-SNR where it is led; elsewhere the guide is not asked.

    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", equation 3; the interval is
    that of Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval".
    """
    low, high = between

    def lead(sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        output = predict(sample, gamma, condition)
        gamma = gamma.to(output.device).expand(len(sample))
        logsnr = torch.logit(gamma.double())
        rows = torch.nonzero((logsnr >= low) & (logsnr <= high)).flatten()
        if len(rows):
            worse = guide(sample[rows], gamma[rows], condition[rows])
            output = output.index_copy(0, rows, worse + guidance * (output[rows] - worse))
        return output

    return lead


class Joined(PaletteScheduler):
    """A student's steps, `own` of them, then its teacher's: at levels that are given, `logsnrs`, whatever number is
    asked for. The student's are of first order, as on a straight line, and so is the teacher's first."""

    logsnrs: list[float]
    own: int

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, task: str | None = None
    ) -> None:
        super().set_timesteps(len(self.logsnrs), device)
        self._gammas[1:] = [1 / (1 + math.exp(-logsnr)) for logsnr in reversed(self.logsnrs)]

    def step(self, model_output: torch.Tensor, timestep: int | torch.Tensor, *rest: Any, **options: Any) -> Any:
        if int(timestep) >= len(self.logsnrs) - 1 - self.own:
            self._before = None
        return super().step(model_output, timestep, *rest, **options)


class Teacher:
    """Makes pairs of a batch of `PaletteDataset`, by a pipeline that samples without noise of its own.

    Args:
        pipe: the teacher; its scheduler's settings hold, but for `sampling_variance`, which is "zero" here.
        tasks: the names of the batch's tasks, in the order of their numbers.
        steps: its network evaluations a picture; 0 takes its default.
        levels: noise levels at which each pair is trained; the first is where the teacher began.
        predict: computes the teacher's network, in place of the pipeline's own way.
        student: computes the student's network, whose own steps then come before the teacher's. Those of one task in a
            batch have the same: none up to all but the last of 2 to `student_steps`, which end anywhere between
            log-SNR 6 and the teacher's last, so that the student may be sampled to any level there.

    Raises:
        ValueError: a task that the teacher does not know; `student_steps` below 2 with a student, or a teacher that
            is not sampled evenly in log-SNR.
    """

    def __init__(
        self,
        pipe: PalettePipeline,
        tasks: list[str],
        steps: int = 0,
        levels: int = 4,
        predict: Predict | None = None,
        student: Predict | None = None,
        student_steps: int = 4,
    ):
        unknown = [task for task in tasks if task not in pipe.config.tasks]
        if unknown:
            raise ValueError(f"tasks has {', '.join(unknown)}, the teacher knows {', '.join(pipe.config.tasks)}")
        if student is not None and student_steps < 2:
            raise ValueError(f"student_steps is {student_steps}, but a student's own steps need at least 2")
        spacing = pipe.scheduler.config.get("sampling_spacing")
        if student is not None and spacing != "logsnr":
            raise ValueError(f"the teacher's sampling_spacing is {spacing!r}, a student's own steps need 'logsnr'")
        self.pipe, self.levels, self.predict = pipe, levels, predict or pipe._predict
        self.student, self.student_steps = student, student_steps
        self.tasks = [get_task(task) for task in tasks]
        self.steps = steps or pipe.config.default_steps
        # the student's own sampling will even chroma out
        settings = dict(sampling_variance="zero", source_eta=None, chroma_guidance=0.0)
        pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config, **settings)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.requires_grad_(False).eval()

    def pairs(self, batch: dict[str, torch.Tensor], alone: bool = False) -> dict[str, torch.Tensor]:
        """A batch of B samples => one of B x `levels`: `clean` is the teacher's picture, and `noise` what lies on the
        line through it and the teacher's first sample; `gamma` is that first sample's level, then drawn evenly in
        log-SNR between it and `LOGSNR_MAX`. Where the student is left `alone`, its own steps are taken, and the teacher
        does not go on: `clean` stays the photograph, and `taught` is 0 instead of 1."""
        clean, noise, first = batch["clean"].clone(), batch["noise"].clone(), batch["gamma"].clone()
        for number, task in enumerate(self.tasks):
            rows = torch.nonzero(batch["task"] == number).flatten()
            if len(rows):
                clean[rows], noise[rows], first[rows] = self._pair(batch, rows, task, alone)
        pairs = {name: batch[name] for name in ("known", "condition", "mask", "task")}
        pairs |= {"clean": clean, "noise": noise, "taught": torch.full_like(first, not alone)}
        many = {name: value.repeat_interleave(self.levels, 0) for name, value in pairs.items()}
        low = torch.logit(first.double()).repeat_interleave(self.levels)
        share = torch.rand_like(low)
        share[:: self.levels] = 0
        logsnr = torch.lerp(low, low.clamp_min(LOGSNR_MAX), share)
        return batch | many | {"gamma": torch.sigmoid(logsnr).float()}

    def predictions(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same batch, but `clean` and `noise` are what the teacher sees in the noisy image that they make: what is
        asked of a network then is the teacher's prediction."""
        gamma, kind = batch["gamma"], self.pipe.scheduler.config.prediction_type
        noisy = diffuse(batch["clean"], batch["noise"], gamma)
        with torch.no_grad():
            output = self.predict(noisy, gamma, fill_holes(batch["condition"]))
        clean = predicted_original(output, noisy, gamma, kind)
        return batch | {"clean": clean, "noise": output_for(clean, noisy, gamma, "epsilon")}

    def _pair(
        self, batch: dict[str, torch.Tensor], rows: torch.Tensor, task: Any, alone: bool
    ) -> tuple[torch.Tensor, ...]:
        """The teacher's pictures of some rows, the noise of their lines, and the level they begin at."""
        known, condition = batch["known"][rows], batch["condition"][rows, :3]
        given = Given(known=known, condition=condition, mask=batch["mask"][rows] if task.takes_mask else None)
        start, scheduler = Start(self.predict), self.pipe.scheduler
        if self.student is not None:
            start, self.pipe.scheduler, task = self._with_own_steps(task)
        latents, start.ends = batch["noise"][rows], alone
        try:
            picture = self.pipe.denoise(
                given, num_inference_steps=self.steps, latents=latents, predict=start, task=task
            )
        except Reached:
            picture = batch["clean"][rows]
        finally:
            self.pipe.scheduler = scheduler
        assert start.sample is not None
        gamma = start.gamma.to(picture.device)
        noise = output_for(picture, start.sample, gamma, "epsilon")
        return picture, noise, gamma.expand(len(rows))

    def _with_own_steps(self, task: Any) -> tuple[Start, Any, Any]:
        """The student's first steps, as many as are drawn, then the teacher's, as far apart as they are otherwise; and
        the task, without its start where these steps are too few for it, as in sampling."""
        config = self.pipe.scheduler.config
        low, high = self.pipe.scheduler.lowest(task.name), config.logsnr_max
        number = int(torch.randint(2, self.student_steps + 1, ()))
        last = min(LOGSNR_LAST, high) + (high - min(LOGSNR_LAST, high)) * float(torch.rand(()))
        levels = [float(level) for level in np.linspace(low, last, number)]
        skipped = 0 if task.start is None else sum(level < task.start for level in levels)
        if skipped == number or (skipped and levels[skipped] - task.start > FAR):
            task, skipped = copy.copy(task), 0
            task.start = None
        own = int((number - skipped - 1 + LAST_SHARE) * torch.rand(()))
        begin = levels[skipped + own]
        spacing = (high - low) / max(1, self.steps - 1)
        rest = np.linspace(begin, high, 1 + max(1, round((high - begin) / spacing))) if begin < high else [begin]
        scheduler: Any = Joined.from_config(config)
        scheduler.logsnrs = [*levels[: skipped + own], *map(float, rest)]
        scheduler.own = skipped + own
        return Start(self.predict, self.student, own), scheduler, task
