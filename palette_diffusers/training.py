"""The loss and the loop. Images are (B, 3, H, W), RGB, [-1, 1]."""

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .scheduler import PaletteScheduler, diffuse, training_target
from .unet import PaletteUNet2DModel

SMALL_BLOCKS = dict(
    down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    resample_type="conv",
)
ADM = "ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"


def _adm(widths: list[int], attention: int) -> dict:
    """ADM's blocks with attention in the last `attention` levels."""
    plain = len(widths) - attention
    return dict(
        block_out_channels=widths,
        down_block_types=[ADM[0]] * plain + [ADM[1]] * attention,
        up_block_types=[ADM[2]] * attention + [ADM[3]] * plain,
    )


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run depends on; `help` is in each field's metadata."""

    data: str = _field("", "images to train on: a folder of parquet files or images, or a Hub id")
    crops: str = _field("", "full-size photographs, for JPEG targets: folders or Hub ids, comma-separated")
    output: str = _field("runs/palette", "folder of the run")
    tasks: str = _field("colorization,inpainting,uncropping,jpeg_restoration", "task names, comma-separated")
    size: int = _field(64, "pixels a side")
    steps: int = _field(1_000_000, "optimiser steps in all")
    batch: int = _field(1024, "samples a step, over all processes")
    rate: float = _field(1e-4, "learning rate")
    warmup: int = _field(10_000, "steps of linear warm-up")
    decay: int = _field(0, "last steps, over which the learning rate falls linearly to 0")
    ema: float = _field(0.9999, "highest decay of the weights' moving average, per step")
    clip: float = _field(1.0, "largest norm of the gradient")
    prediction_type: str = _field("epsilon", "epsilon (the paper), v_prediction or sample")
    precision: str = _field("no", "no, bf16 or fp16")
    workers: int = _field(1, "processes that prepare samples")
    save_every: int = _field(500, "steps between checkpoints")
    log_every: int = _field(50, "steps between lines of the log")
    max_hours: float = _field(0.0, "stop, saved, after this many hours; 0 = never")
    seed: int = _field(0, "of everything")
    init: str = _field("", "start from the weights of this pipeline: a folder or Hub id")
    resume: bool = _field(False, "go on from the last checkpoint in the output folder")
    unet: dict = field(default_factory=dict, metadata={"help": "the network's configuration, as JSON"})


# preset       size  batch  steps      rate  warmup  ema     prediction      network
PRESETS = {
    "starter-64": (64, 32, 20_000, 6e-4, 200, 0.999, "v_prediction", dict(
        sample_size=64, patch_size=2, condition_skip=0.2, block_out_channels=[48, 96, 192], layers_per_block=1,
        norm_num_groups=16, attention_head_dim=64, **SMALL_BLOCKS)),
    "palette-64": (64, 256, 300_000, 1e-4, 10_000, 0.9999, "epsilon", dict(
        sample_size=64, **_adm([128, 256, 384, 512], 3))),
    "palette-128": (128, 256, 500_000, 1e-4, 10_000, 0.9999, "epsilon", dict(
        sample_size=128, **_adm([256, 256, 512, 768, 1024], 3))),
    "palette-256": (256, 1024, 1_000_000, 1e-4, 10_000, 0.9999, "epsilon", dict(
        sample_size=256, **_adm([256, 256, 512, 512, 1024, 1024], 3))),
}  # fmt: skip


def preset(name: str) -> TrainSettings:
    """The settings of a preset.

    Raises:
        ValueError: no preset has this name; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    size, batch, steps, rate, warmup, ema, prediction_type, unet = PRESETS[name]
    return replace(
        TrainSettings(),
        size=size, batch=batch, steps=steps, rate=rate, warmup=warmup, ema=ema,
        prediction_type=prediction_type, unet=unet,
    )  # fmt: skip


def masked_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error, a mean over the hole per sample, then over the batch (so that processes may differ in
    their holes): a float32 scalar. mask is (B, 1, H, W), 1 where the loss counts."""
    error = (output.float() - target.float()).square().mean(1, keepdim=True) * mask
    return (error.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)).mean()


def training_loss(unet: torch.nn.Module, batch: dict[str, torch.Tensor], prediction_type: str) -> torch.Tensor:
    """Algorithm 1 of the paper on a batch of `PaletteDataset`."""
    noisy = diffuse(batch["clean"], batch["noise"], batch["gamma"])
    output = unet(noisy, batch["gamma"], batch["condition"], return_dict=False)[0]
    target = training_target(batch["clean"], batch["noise"], batch["gamma"], prediction_type)
    return masked_loss(output, target, batch["mask"])


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, constant (the paper), then an optional linear fall to 0."""
    rate = settings.rate * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.decay:
        rate *= min(1.0, max(0.0, (settings.steps - step) / settings.decay))
    return rate


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group stops the run from the main process, which saves first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def save_state(folder: Path, step: int, **parts: object) -> Path:
    """Writes a checkpoint beside and renames it; then removes older ones."""
    part, final = folder / f"step-{step:07d}.part", folder / f"step-{step:07d}.pt"
    torch.save({"step": step, **parts}, part)
    os.replace(part, final)
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()
    return final


def last_state(folder: Path) -> dict | None:
    """The newest checkpoint of a run, or None."""
    found = sorted(folder.glob("step-*.pt"))
    return torch.load(found[-1], map_location="cpu", weights_only=True) if found else None


def train(settings: TrainSettings) -> Path:
    """Trains, saves and resumes; returns the folder of the finished pipeline (EMA weights).

    SIGTERM and SIGINT save and stop. Losses that are not finite stop the run with the last good state kept.
    """
    from accelerate import Accelerator
    from datasets import concatenate_datasets
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader

    from .data import PaletteDataset, PositionSampler, load_images, only_images
    from .pipeline import PalettePipeline

    if not settings.data:
        raise ValueError("data is empty: name a folder of parquet files or images, or a Hub id")
    accelerator = Accelerator(mixed_precision=settings.precision)
    if settings.batch % accelerator.num_processes:
        raise ValueError(f"batch is {settings.batch}, expected a multiple of {accelerator.num_processes} processes")
    torch.manual_seed(settings.seed)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = settings.tasks.split(",")
    scheduler = PaletteScheduler(prediction_type=settings.prediction_type)
    crops = [load_images(path) for path in settings.crops.split(",") if path]
    crops = [only_images(data) for data in crops]
    dataset = PaletteDataset(
        load_images(settings.data),
        scheduler,
        tasks,
        crops=concatenate_datasets(crops) if crops else None,
        size=settings.size,
        seed=settings.seed,
    )
    if settings.init:
        unet = PalettePipeline.from_pretrained(settings.init).unet.float()
    else:
        unet = PaletteUNet2DModel(**settings.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.rate, weight_decay=0.0)
    ema = EMAModel(unet.parameters(), decay=settings.ema, use_ema_warmup=True, power=0.75)
    start = 0
    state = last_state(folder) if settings.resume else None
    if state is not None:
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
    loader = DataLoader(
        dataset,
        batch_size=settings.batch // accelerator.num_processes,
        sampler=PositionSampler(start * settings.batch, settings.steps * settings.batch),
        num_workers=settings.workers,
        worker_init_fn=_ignore_signals,
        drop_last=True,
        persistent_workers=settings.workers > 0,
        prefetch_factor=4 if settings.workers else None,
    )
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    ema.to(accelerator.device)
    if accelerator.is_main_process:
        (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")

    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stop.append(n))

    def save(step: int) -> None:
        if accelerator.is_main_process:
            raw = accelerator.unwrap_model(unet)
            save_state(folder, step, unet=raw.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict())

    begin, step, total, window = time.time(), start, 0.0, time.time()
    unet.train()
    for batch in loader:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        with accelerator.autocast():
            loss = training_loss(unet, batch, settings.prediction_type)
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss is {value} at step {step}: the last good state is in {folder}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        step += 1
        total += value
        if step % settings.log_every == 0:
            speed = settings.log_every * settings.batch / (time.time() - window)
            line = {"step": step, "loss": round(total / settings.log_every, 5), "samples_per_second": round(speed, 1)}
            if accelerator.is_main_process:
                print(json.dumps(line), flush=True)
                with open(folder / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            total, window = 0.0, time.time()
        late = settings.max_hours and time.time() - begin > settings.max_hours * 3600
        if stop or late:
            break
        if step % settings.save_every == 0:
            save(step)
    save(step)
    final = folder / "pipeline"
    if accelerator.is_main_process:
        raw = accelerator.unwrap_model(unet)
        ema.copy_to(raw.parameters())
        pipe = PalettePipeline(unet=raw.eval(), scheduler=scheduler, tasks=tasks, default_task=tasks[0])
        part = folder / "pipeline.part"
        shutil.rmtree(part, ignore_errors=True)
        pipe.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        print(f"step {step}: the pipeline is in {final}", flush=True)
    accelerator.end_training()
    return final
