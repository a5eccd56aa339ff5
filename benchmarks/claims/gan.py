"""A conditional GAN with the diffusion model's network as generator: pix2pix's objective (Isola et al. 2017).

The generator maps noise and the source to the picture in one step: a `PalettePipeline` of one step, measured as the
others are. Images are (B, 3, H, W), RGB, [-1, 1]; masks (B, 1, H, W), 1 = generate.
"""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from palette_diffusers import PalettePipeline, PaletteUNet2DModel
from palette_diffusers.data import PaletteDataset, PositionSampler
from palette_diffusers.files import alone, write_text
from palette_diffusers.machine import best_device
from palette_diffusers.scheduler import predicted_original
from palette_diffusers.sources import load_images
from palette_diffusers.tasks import fill_holes
from palette_diffusers.training import (
    DTYPES,
    TrainSettings,
    check_same,
    last_state,
    learning_rate,
    make_scheduler,
    masked_loss,
    regression_gamma,
    save_state,
)

L1_WEIGHT = 100.0  # lambda of the paper
JUDGE_RATE = 2e-4
BETAS = (0.5, 0.999)


class PatchDiscriminator(nn.Module):
    """PatchGAN: a source (B, C, H, W) and a picture (B, 3, H, W) => logits (B, 1, h, w), each of a patch of 34 pixels.

    Source: Isola et al. 2017, appendix 6.1.2, with one level less than for 256 pixels.
    """

    def __init__(self, condition_channels: int = 3, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(condition_channels + 3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for out, stride in ((2 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(out // 2, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))

    def forward(self, condition: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([condition, image], 1))


# Isola et al. 2017, equations 1 to 4; the generator maximises log D, as the authors do
def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Of logits on originals and on generated pictures; halved, which slows D relative to G."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def generator_losses(fake: torch.Tensor, image: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each sample, (B,): what D's logits say of it, and L1 inside the mask."""
    return F.softplus(-fake.float()).mean((1, 2, 3)) + L1_WEIGHT * masked_loss(image, clean, mask, "l1")


def generate(unet: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The pictures of a batch, in one step from noise: what a pipeline of one step does."""
    gamma = torch.full_like(batch["gamma"], regression_gamma())
    output = unet(batch["noise"], gamma, batch["condition"], return_dict=False)[0]
    return predicted_original(output, batch["noise"], gamma, "v_prediction")


def composed(image: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is known stays, as in the picture that is returned in the end."""
    return torch.where(batch["mask"] > 0, image, batch["clean"])


def _batches(settings: TrainSettings, start: int, holes: bool) -> Iterator[dict[str, torch.Tensor]]:
    dataset = PaletteDataset(
        load_images(settings.data), make_scheduler(settings), settings.task_list, size=settings.size,
        seed=settings.seed, holes=holes,
    )  # fmt: skip
    positions = PositionSampler(start * settings.batch, settings.steps * settings.batch)
    return iter(torch.utils.data.DataLoader(dataset, settings.batch, sampler=positions, num_workers=settings.workers))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Gathers SIGTERM and SIGINT instead of obeying them."""
    got: list[int] = []
    before = {number: signal.signal(number, lambda n, _: got.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Game:
    """Both networks, their optimisers and the generator's moving average."""

    def __init__(self, settings: TrainSettings):
        from diffusers.training_utils import EMAModel

        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, best_device()
        self.generator = PaletteUNet2DModel(**settings.unet | {"sample_size": settings.size}).to(self.device).train()
        channels = settings.unet.get("condition_channels", 3) + bool(settings.unet.get("hole_skip"))
        self.judge = PatchDiscriminator(channels).to(self.device)
        options = dict(betas=BETAS, weight_decay=settings.weight_decay)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), settings.rate, **options)
        self.judge_optimizer = torch.optim.AdamW(self.judge.parameters(), JUDGE_RATE, **options)
        self.ema = EMAModel(self.generator.parameters(), decay=settings.ema, use_ema_warmup=True, power=0.75)
        given = settings.numbers("loss_weights")
        self.shares = torch.tensor([given.get(task, 1.0) for task in settings.task_list], device=self.device)
        self.dtype = DTYPES[settings.precision]

    def parts(self) -> dict[str, object]:
        return dict(
            unet=self.generator, judge=self.judge, optimizer=self.optimizer, judge_optimizer=self.judge_optimizer,
            ema=self.ema,
        )  # fmt: skip

    def step(self, batch: dict[str, torch.Tensor], rate: float) -> dict[str, float]:
        """One of each network, D first; the learning rates fall and rise together."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        batch["condition"] = fill_holes(batch["condition"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for group in self.judge_optimizer.param_groups:
            group["lr"] = rate * JUDGE_RATE / self.settings.rate
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            image = generate(self.generator, batch)
            shown = composed(image, batch)
            real = self.judge(batch["condition"], batch["clean"])
            judged = discriminator_loss(real, self.judge(batch["condition"], shown.detach()))
        self._update(self.judge_optimizer, self.judge, judged)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            fake = self.judge(batch["condition"], shown)
            losses = generator_losses(fake, image, batch["clean"], batch["mask"])
        loss = (losses * self.shares[batch["task"]]).mean()
        self._update(self.optimizer, self.generator, loss)
        self.ema.step(self.generator.parameters())
        return {"loss": loss.item(), "judge": judged.item(), "fooled": (fake > 0).float().mean().item()}

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.settings.clip or math.inf)
        optimizer.step()


def train(settings: TrainSettings) -> Path:
    """As `palette_diffusers.training.train`, for the GAN: saves, resumes, leaves a pipeline of one step.

    Raises:
        ValueError: the folder holds a run of other settings. FloatingPointError: a loss is not finite.
    """
    folder = Path(settings.output)
    with alone(folder, other="another process is training"), _signals() as stop:
        check_same(folder, settings)
        write_text(folder / "settings.json", json.dumps(asdict(settings), indent=2) + "\n")
        game, step = Game(settings), 0
        state = last_state(folder)
        if state is not None:
            step = state["step"]
            for name, part in game.parts().items():
                part.load_state_dict(state[name])
        batches = _batches(settings, step, bool(game.generator.config.hole_skip))

        def save() -> None:
            save_state(folder, step, settings.keep, **{n: part.state_dict() for n, part in game.parts().items()})

        begin = time.perf_counter()
        while step < settings.steps and not stop:
            torch.manual_seed(int(np.random.SeedSequence((settings.seed, 3, step)).generate_state(1)[0]))
            line = game.step(next(batches), learning_rate(settings, step))
            if not math.isfinite(line["loss"] + line["judge"]):
                raise FloatingPointError(f"the loss is not finite at step {step}: the last state is in {folder}")
            step += 1
            if step % settings.log_every == 0:
                speed = settings.log_every * settings.batch / (time.perf_counter() - begin)
                line |= {"step": step, "samples_per_second": speed}
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps({key: round(value, 5) for key, value in line.items()}) + "\n")
                begin = time.perf_counter()
            if step % settings.save_every == 0:
                save()
        save()
        game.ema.copy_to(game.generator.parameters())
        pipe = PalettePipeline(
            game.generator.eval(), make_scheduler(settings), tasks=settings.task_list,
            default_task=settings.task_list[0], default_steps=1,
        )  # fmt: skip
        pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
