"""The loss and the loop. Images are (B, 3, H, W), RGB, [-1, 1]."""

import copy
import filecmp
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from .adversarial import Critic
from .batches import batches
from .files import alone, write_text
from .fused import use_fused_blocks
from .norms import use_channels_last_norms
from .replay import Replay, ReplayedForward
from .report import Tally, cut_back, draw_batch, draw_samples, licences, write_card, write_report
from .scheduler import PaletteScheduler, diffuse, training_target
from .settings import PRESETS, TrainSettings, parse, preset
from .sharding import share, share_optimizer, whole
from .sources import listing, split_sources, would_read
from .speed import build
from .states import check_same, check_state, last_state, save_state
from .tasks import fill_holes
from .unet import PaletteUNet2DModel
from .zero import autocast, configure, gradient_norm, load_optimizer_state, optimizer_state, precision_of

__all__ = ["PRESETS", "TrainSettings", "main", "parse", "preset", "train"]

COUNTED = ("gamma", "task", "skipped", "gray", "taught")
CRITIC_CLIP = 10.0  # largest norm of a critic's gradient, which is 1 or less as a rule
DTYPES = {"": torch.float32, "no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a student learns from of its teacher's sampling, all but the first on policy, and its own steps there
LEARNT = (
    "slow_noise", "initial_noise", "task_noise", "sampling_spacing", "logsnr_min", "logsnr_max", "task_logsnr_min",
)  # fmt: skip
STRAIGHT = dict(sampling_variance="zero", sampling_order=1)
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def masked_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, kind: str = "l2") -> torch.Tensor:
    """The error of each sample, a mean over its hole: float32 (B,). mask is (B, 1, H, W), 1 where the loss counts.

    A mean over the holes of the whole batch would weigh small holes less, and differ between one process and two.
    """
    output, target = output.float(), target.float()
    if kind == "l2":
        error = (output - target).square()
    elif kind == "l1":
        error = (output - target).abs()
    else:
        error = F.huber_loss(output, target, reduction="none", delta=0.1) / 0.1
    error = error.mean(1, keepdim=True) * mask
    return error.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)


def picture_weight(gamma: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """How much an error in y0 weighs in the plain loss of each prediction type, (B,)."""
    snr = gamma / (1 - gamma)
    return {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[prediction_type]


def snr_weight(gamma: torch.Tensor, limit: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR weighting (Hang et al. 2023, equation 8 and appendix), (B,): in terms of y0, min(SNR, limit)."""
    return (gamma / (1 - gamma)).clamp(max=limit) / picture_weight(gamma, prediction_type)


def capped_weight(gamma: torch.Tensor, cap: float, prediction_type: str) -> torch.Tensor:
    """Leaves the plain weighting as it is up to `cap` in terms of y0, (B,).

    Min-SNR also takes the noisiest levels down, which is where colours are decided; this does not.
    """
    return (cap / picture_weight(gamma, prediction_type)).clamp(max=1)


def sample_losses(unet: torch.nn.Module, batch: dict[str, torch.Tensor], settings: TrainSettings) -> torch.Tensor:
    """Algorithm 1 of the paper on a batch of `PaletteDataset`: the loss of each sample, (B,)."""
    return _losses(unet, batch, settings)[0]


def _losses(unet: torch.nn.Module, batch: dict[str, torch.Tensor], settings: TrainSettings) -> tuple[torch.Tensor, ...]:
    """The loss of each sample, what the network said, and of which noisy images."""
    gamma, noise, condition = batch["gamma"], batch["noise"], fill_holes(batch["condition"])
    if settings.regression:
        gamma, noise = torch.full_like(gamma, regression_gamma()), torch.zeros_like(noise)
        noisy = noise
    else:
        noisy = diffuse(batch["clean"], noise, gamma)
    output = unet(noisy, gamma, condition, return_dict=False)[0]
    target = training_target(batch["clean"], noise, gamma, settings.prediction_type)
    losses = masked_loss(output, target, batch["mask"], settings.loss)
    if settings.snr_gamma:
        losses = losses * snr_weight(gamma, settings.snr_gamma, settings.prediction_type)
    if settings.weight_cap:
        losses = losses * capped_weight(gamma, settings.weight_cap, settings.prediction_type)
    return losses, output, noisy


def training_loss(unet: torch.nn.Module, batch: dict[str, torch.Tensor], settings: TrainSettings) -> torch.Tensor:
    """The mean of `sample_losses`."""
    return sample_losses(unet, batch, settings).mean()


def make_scheduler(settings: TrainSettings) -> PaletteScheduler:
    """The scheduler that a run trains with and publishes: the paper's training schedule, sampling in few steps."""
    return PaletteScheduler(
        prediction_type=settings.prediction_type,
        sampling_spacing="logsnr",
        sampling_variance="fixed_small",
        initial_noise=0.0 if settings.regression else 1.0,
    )


def regression_gamma() -> float:
    """The level that the regression twin is told: that of sampling in a single step."""
    return 1 / (1 + math.exp(-PaletteScheduler().config.logsnr_min))


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, then constant (the paper) with an optional linear fall to 0, or a half cosine to 0."""
    rate = settings.rate * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))
    elif settings.decay:
        rate *= min(1.0, max(0.0, (settings.steps - step) / settings.decay))
    return rate


class Later:
    """Numbers of a step. A GPU's are read a step later, since it would stand still while they are waited for; a CPU's
    at once."""

    def __init__(self, waits: bool):
        self._waits = waits
        self._pending: list[tuple[int, dict[str, torch.Tensor], Any]] = []

    def put(self, step: int, **numbers: torch.Tensor) -> None:
        event = None
        if self._waits:
            numbers = {k: torch.empty_like(v, device="cpu", pin_memory=True).copy_(v, True) for k, v in numbers.items()}
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, numbers, event))

    def take(self, before: int | None = None) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The steps and numbers that have come in; None waits for all of them."""
        while self._pending and not (self._waits and before is not None and self._pending[0][0] >= before):
            step, numbers, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            yield step, numbers


# the parts of a run


def _pipeline(name: str, size: int) -> Any:
    """The pipeline of a name, if it is of this size."""
    from .pipeline import PalettePipeline

    pipe = PalettePipeline.from_pretrained(name)
    if pipe.unet.config.sample_size != size:
        raise ValueError(f"{name} is of {pipe.unet.config.sample_size} pixels, the settings say {size}")
    return pipe


def _new_network(settings: TrainSettings) -> PaletteUNet2DModel:
    try:
        return PaletteUNet2DModel(**settings.unet | {"sample_size": settings.size})
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"unet is {settings.unet}, of which no network can be made: {error}") from None


def _network(settings: TrainSettings) -> tuple[PaletteUNet2DModel, PaletteScheduler, int, int | None]:
    """The network, the scheduler and the steps that are published: new ones, or those of `init`."""
    if not settings.init:
        few = settings.student_steps if settings.distils else None
        return _new_network(settings), make_scheduler(settings), few or (1 if settings.regression else 20), few
    pipe = _pipeline(settings.init, settings.size)
    kind = pipe.scheduler.config.prediction_type
    if kind != settings.prediction_type:
        raise ValueError(f"{settings.init} predicts {kind}, the settings say {settings.prediction_type}")
    if settings.regression:
        return pipe.unet.float(), make_scheduler(settings), 1, None
    if settings.distils:
        return pipe.unet.float(), pipe.scheduler, settings.student_steps, settings.student_steps
    return pipe.unet.float(), pipe.scheduler, pipe.config.default_steps, pipe.config.few_steps


def _teacher(settings: TrainSettings, device: torch.device, precision: str, unet: PaletteUNet2DModel) -> Any:
    """The teacher of the network, `unet`, if there is one; with `cuda_graph`, forward passes are replayed."""
    if not settings.teacher:
        return None
    from .distillation import Teacher, guided

    pipe = _pipeline(settings.teacher, settings.size).to(device)
    _check_alike(pipe, unet, settings)
    dtype = DTYPES.get(precision, torch.float32)
    student: Any = partial(_own, unet, device.type, dtype) if settings.on_policy else None
    if student and settings.cuda_graph:
        student = ReplayedForward(student)
    predict = _predictor(pipe, settings, dtype)
    if settings.guide:
        guide = _pipeline(settings.guide, settings.size).to(device)
        _check_same(guide, settings.guide, pipe.unet, pipe.scheduler.config.prediction_type, "guide")
        between = settings.guided_from, settings.guided_to
        predict = guided(predict, _predictor(guide, settings, dtype), settings.guidance, between)
    steps = settings.student_steps
    return Teacher(pipe, settings.task_list, settings.teacher_steps, settings.levels, predict, student, steps)


def _predictor(pipe: Any, settings: TrainSettings, dtype: torch.dtype) -> Any:
    """Computes a network that is not trained, in this type."""
    torch.nn.Module.to(pipe.unet.requires_grad_(False).eval(), dtype)  # autocast would cast it at every evaluation
    if not settings.cuda_graph:
        return pipe._predict
    _lay_out(pipe.unet, replace(settings, checkpointing=False))
    return ReplayedForward(pipe._predict)


def _check_alike(teacher: Any, unet: PaletteUNet2DModel, settings: TrainSettings) -> None:
    """Where one sampling has both networks, or what one says is shown to the other.

    Raises:
        ValueError: they predict, or are given, different things.
    """
    for need, wanted in (
        ("on_policy", settings.on_policy),
        ("learns", settings.learns == "predictions"),
        ("adversarial", settings.adversarial),
    ):
        if wanted:
            _check_same(teacher, settings.teacher, unet, settings.prediction_type, need)


def _check_same(pipe: Any, name: str, unet: PaletteUNet2DModel, kind: str, need: str) -> None:
    """That the pipeline of this name predicts and is given what `unet` does, which predicts `kind`; `need` asks it."""
    for what, theirs, own in (
        ("prediction_type", pipe.scheduler.config.prediction_type, kind),
        ("hole_skip", bool(pipe.unet.config.hole_skip), bool(unet.config.hole_skip)),
    ):
        if theirs != own:
            raise ValueError(f"{what} is {own!r}, {name}'s {theirs!r}: {need} needs the same")


@torch.no_grad()
def _own(unet: PaletteUNet2DModel, device: str, dtype: torch.dtype, *given: Any) -> torch.Tensor:
    """What a network that is being trained predicts now. Its weights are cast anew each time: of those that were cast
    before, a recording would keep the first. (Accelerate gives a network a `forward` that keeps them: not that one.)"""
    training = unet.training
    with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        output = type(unet).forward(unet.eval(), *given).sample.float()  # type: ignore[union-attr]
    unet.train(training)
    return output


def _folder_of(init: str) -> Path:
    from .pipeline import SHIPPED

    return SHIPPED.get(init, Path(init)).resolve()


def _adapt(unet: PaletteUNet2DModel, settings: TrainSettings) -> None:
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError:
        raise ValueError("lora_rank needs peft: pip install 'palette-diffusers[lora]'") from None
    if settings.lora_init and Path(settings.lora_init).resolve().is_relative_to(_folder_of(settings.init)):
        raise ValueError(
            f"lora_init is {settings.lora_init!r}, but the weights of init, {settings.init!r}, have these adapters "
            "already: expected the init that they were trained on"
        )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=LORA_TARGETS))
    if settings.lora_init:
        file = Path(settings.lora_init) / "pytorch_lora_weights.safetensors"
        try:
            unknown = set_peft_model_state_dict(unet, load_file(file)).unexpected_keys  # type: ignore[attr-defined]
        except RuntimeError as error:  # of shapes
            why = str(error).splitlines()  # a line for each layer
            some = "\n".join(why[:3])
            raise ValueError(f"{file} does not fit adapters of rank {settings.lora_rank}: {some}") from None
        if unknown:
            raise ValueError(f"{file} has adapters of layers that the network does not adapt: {', '.join(unknown)}")


def _trainable(settings: TrainSettings) -> tuple[PaletteUNet2DModel, PaletteScheduler, int, int | None]:
    """As `_network`, with adapters where the settings ask for them."""
    network = _network(settings)
    if settings.lora_rank:
        _adapt(network[0], settings)
    return network


def _lay_out(unet: PaletteUNet2DModel, settings: TrainSettings) -> None:
    """How the network computes, as the settings say."""
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.channels_last:
        unet.to(memory_format=torch.channels_last)
        use_channels_last_norms(unet)
    if settings.fused:
        use_fused_blocks(unet)


def _optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(lr=settings.rate, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("optimizer adamw8bit needs the package bitsandbytes, which is not installed") from None
        return AdamW8bit(parameters, **options)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, fused=torch.cuda.is_available(), **options)


def _may_step(optimizer: Any, norm: torch.Tensor, sharded: bool) -> bool:
    """Whether the gradient is finite. A fused optimizer is told, and finds out itself: a GPU is not waited for."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.defaults.get("fused") and not sharded:
        inner.grad_scale, inner.found_inf = None, (~torch.isfinite(norm)).float()
        return True
    return bool(torch.isfinite(norm))


def _by_task(settings: TrainSettings, name: str) -> list[float]:
    """A setting's number for each task of the run; a name that is no task is an error."""
    from .tasks import get_task

    given = settings.numbers(name)
    for task in given:
        get_task(task)
    return [given.get(task, 1.0) for task in settings.task_list]


def _dataset(settings: TrainSettings, scheduler: PaletteScheduler, holes: bool, **place: Any) -> Any:
    """The samples of a run; `place` says where a stream goes on (`PaletteStream`)."""
    from datasets import concatenate_datasets

    from .data import PaletteDataset, PaletteStream
    from .sources import load_images, load_sources, only_images

    if not settings.data:
        raise ValueError("data is empty: name a folder of parquet files, *.tar shards or images, or a Hub id")
    images, shares = load_sources(settings.data, settings.streaming)
    crops = [only_images(load_images(path)) for path in map(str.strip, settings.crops.split(",")) if path]
    kind: Any = PaletteDataset
    options: dict[str, Any] = {}
    if settings.streaming:
        kind, options = PaletteStream, dict(shuffle_buffer=settings.shuffle_buffer, workers=settings.workers, **place)
    return kind(
        images,
        PaletteScheduler.from_config(scheduler.config),  # the published one may be another solver
        settings.task_list,
        weights=_by_task(settings, "task_weights"),
        crops=concatenate_datasets(crops) if crops else None,
        crop_share=settings.crop_share,
        size=settings.size,
        seed=settings.seed,
        column=settings.column,
        source_column=settings.source_column,
        source_weights=shares,
        condition_dropout=settings.condition_dropout,
        strict=settings.strict,
        holes=holes,
        **options,
    )


def _check_graph(settings: TrainSettings, accelerator: Any) -> None:
    """Raises:
    ValueError: more than one recording can do.
    """
    where, kind = accelerator.device.type, str(getattr(accelerator.distributed_type, "value", ""))
    if where != "cuda" or kind != "NO" or settings.accumulate > 1 or accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"cuda_graph is on, expected one plain process on cuda, accumulate 1 and no fp16: here are {where}, "
            f"distribution {kind}, accumulate {settings.accumulate} and precision {accelerator.mixed_precision}; "
            "--no-cuda-graph leaves it out"
        )


def _check_half(precision: str, device: str) -> None:
    """Raises:
    ValueError: fp16 where Accelerate would leave it out in silence.
    """
    if precision == "fp16" and device == "cpu":
        raise ValueError("precision is fp16, which a CPU is not trained in: expected bf16 or no")


def _check_output(settings: TrainSettings) -> None:
    """Raises:
    ValueError: the run would write pictures among those that it is trained on.
    """
    for path in _local(settings):
        if would_read(path, Path(settings.output).expanduser()):
            raise ValueError(f"output is {settings.output!r}, inside {path}, whose images are all trained on")


def _local(settings: TrainSettings) -> list[Path]:
    """The folders that a run's photographs come from."""
    paths = [path for path, _ in split_sources(settings.data)] + [path.strip() for path in settings.crops.split(",")]
    folders = [Path(path).expanduser() for path in paths if path]
    return [folder for folder in folders if folder.is_dir()]


def _check_hub(settings: TrainSettings) -> None:
    """Whether anything can be pushed at the end, asked before the beginning.

    Raises:
        ValueError: there is no login, the Hub is not reached, the name is none, or its card was edited there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if settings.push_to_hub:
        from .hub import EditedCard, check_card, check_name

        check_name(settings.push_to_hub)
        try:
            HfApi().whoami()
            check_card(settings.push_to_hub)
        except (OSError, HTTPError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(
                f"push_to_hub is {settings.push_to_hub!r}, but the Hub refuses: {why} (hf auth login)"
            ) from None
        except EditedCard:
            raise ValueError(
                f"the card of {settings.push_to_hub} was edited on the Hub: train without push_to_hub, then "
                f"{_publish_command(settings)} --overwrite-card"
            ) from None


def _publish_command(settings: TrainSettings) -> str:
    return shlex.join(["palette", "publish", settings.output, settings.push_to_hub])


def _push(settings: TrainSettings, final: Path) -> None:
    """Raises:
    OSError: the upload failed; the message says how it is done later.
    """
    from huggingface_hub.errors import HTTPError

    from .hub import EditedCard, publish

    try:
        print(publish(settings.output, settings.push_to_hub), flush=True)
    except (OSError, ValueError, HTTPError) as error:
        again = _publish_command(settings) + (" --overwrite-card" if isinstance(error, EditedCard) else "")
        raise OSError(f"the upload failed: {error}; the pipeline is in {final}, to upload it: {again}") from error


def _tell_rate(settings: TrainSettings) -> str:
    """What to say of a learning rate that a run never comes near to; empty where it does."""
    peak = max(learning_rate(settings, step) for step in range(0, settings.steps, max(1, settings.steps // 1000)))
    if peak > 0.9 * settings.rate:
        return ""
    falls = f" and decay {settings.decay:,}" if settings.decay else ""
    return (
        f"the learning rate comes to {peak:.2g} at most, not to {settings.rate:g}: warmup {settings.warmup:,}{falls} "
        f"leave no room in {settings.steps:,} steps"
    )


def _accelerator(settings: TrainSettings) -> Any:
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin

    installed = [str(tracker.value) for tracker in get_available_trackers()]
    tracker = settings.tracker
    if tracker == "auto":
        tracker = "tensorboard" if "tensorboard" in installed else "none"
    if tracker not in ("none", *installed):
        raise ValueError(f"tracker {tracker!r} needs the package of that name, which is not installed")
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if parts.isdecimal() and int(parts) not in (1, settings.accumulate):
        raise ValueError(
            f"Accelerate is configured to accumulate {parts} parts, the settings say {settings.accumulate}: expected "
            "accumulate alone"
        )
    accelerator = Accelerator(
        mixed_precision=settings.precision or None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # what is added up is divided here
        log_with=None if tracker == "none" else tracker,
        project_dir=settings.output,
    )
    _check_half(accelerator.mixed_precision, accelerator.device.type)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "MEGATRON_LM" or (kind == "FSDP" and not accelerator.is_fsdp2):
        name = "FSDP 1" if kind == "FSDP" else kind
        raise ValueError(
            f"Accelerate is configured for {name}, expected one process, DDP, FSDP with fsdp_version 2 or DeepSpeed"
        )
    for name in ("on_policy", "adversarial"):
        if kind in ("FSDP", "DEEPSPEED") and getattr(settings, name):
            raise ValueError(f"{name} is on, but Accelerate is configured for {kind}: expected one process or DDP")
    if kind == "FSDP":
        if settings.channels_last:
            raise ValueError("channels_last is on, but FSDP divides only weights in the plain layout: leave it out")
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:  # it would round noise levels and pictures, too
            exact = replace(plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None)
            plugin.mixed_precision_policy = exact
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch % parts:
        raise ValueError(
            f"batch is {settings.batch}, expected a multiple of {parts}, processes times accumulated parts"
        )
    if settings.cuda_graph and not settings.dry_run:  # which may be on another machine
        _check_graph(settings, accelerator)
    if kind == "DEEPSPEED":
        plugin, micro_batch = accelerator.state.deepspeed_plugin, settings.batch // parts
        if settings.optimizer == "adamw8bit":
            raise ValueError("optimizer is adamw8bit, whose states DeepSpeed cannot divide: expected adamw or adam")
        if settings.channels_last:
            raise ValueError("channels_last is on, but DeepSpeed lays weights out plainly: leave it out")
        if settings.bad_steps:
            raise ValueError(f"bad_steps is {settings.bad_steps}, expected 0: DeepSpeed steps before it tells the norm")
        configure(plugin, accelerator.mixed_precision, micro_batch, settings.accumulate, settings.clip)
    return accelerator


def dry_run(settings: TrainSettings) -> None:
    """What a run will take: size, memory and work of the network, speed by a short probe, hours, and a picture
    of one degraded batch in the output folder."""
    from torch.utils.flop_counter import FlopCounterMode

    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    unet, scheduler, *_ = _trainable(settings)
    dataset = _dataset(settings, scheduler, bool(unet.config.hole_skip))
    with closing(batches(dataset, settings)) as some:
        batch = next(some)
    draw_batch(batch, settings.task_list, folder / "batch.png")
    parameters = sum(p.numel() for p in unet.parameters())
    one = {k: v[:1] for k, v in batch.items()}
    with FlopCounterMode(display=False) as counter:
        training_loss(unet, one, settings).backward()
    _lay_out(unet, settings)
    trained = [p for p in unet.parameters() if p.requires_grad]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_half(settings.precision, device)
    unet.to(device).train()
    optimizer = _optimizer(trained, settings)
    dtype = DTYPES[settings.precision]
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        here = {k: v[:16].to(device) for k, v in batch.items()}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = training_loss(unet, here, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - begin)
    speed = min(16, len(batch["clean"])) / sorted(times[1:])[1]
    hours = settings.steps * settings.batch / speed / 3600
    images = "a stream" if settings.streaming else f"{len(dataset):,} images"
    memory = (parameters * 4 + sum(p.numel() for p in trained) * 16) / 2**30
    print(
        f"network: {parameters / 1e6:.1f}M parameters, {counter.get_total_flops() / 1e9:.1f} GFLOP a training sample\n"
        f"memory: {memory:.2f} GiB for weights, gradients, optimiser and EMA; activations add to it\n"
        f"data: {images}, tasks {', '.join(settings.task_list)}; a batch in {folder / 'batch.png'}\n"
        f"speed: {speed:.1f} samples a second on one {device}, {hours:.1f} hours to step {settings.steps:,}"
        + (" (eager: compile and cuda_graph are not tried)" if settings.compile or settings.cuda_graph else "")
        + (" (without the teacher's work, and a critic's)" if settings.teacher else "")
        + (f"\nwarning: {warning}" if (warning := _tell_rate(settings)) else "")
    )


def train(settings: TrainSettings) -> Path:
    """Trains, saves and resumes; returns the folder of the finished pipeline (EMA weights).

    SIGTERM and SIGINT save and stop, as `max_hours` does; the command to go on is printed. A loss that is not
    finite stops the run, the last good state kept.

    Raises:
        ValueError: settings that don't fit each other, the data, or the run that is to be continued.
        FileNotFoundError: data that is not there. FileExistsError: the folder holds a run, or one is going on.
        FloatingPointError: the loss is not finite.
    """
    _check_output(settings)
    accelerator = _accelerator(settings)
    folder, main = Path(settings.output), accelerator.is_main_process
    if not settings.resume and any(folder.glob("step-*.pt")):
        raise FileExistsError(f"{folder} holds a run: continue it by resume, or name another output")
    if settings.resume:
        check_same(folder, settings)
    _check_hub(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.dry_run:
        if main:
            dry_run(settings)
        return folder
    if main and (warning := _tell_rate(settings)):
        print(f"warning: {warning}", file=sys.stderr)
    with alone(folder, other="another process is training") if main else nullcontext():
        final, step = _run(settings, accelerator, folder)
        if main and step >= settings.steps and settings.push_to_hub:
            _push(settings, final)
    return final


def main(description: str | None = None, **changes: Any) -> None:
    """A training script: the command line (`parse`), the run, and errors as messages; exits with 2 where something was
    asked that can't be done, with 1 where the run failed."""
    try:
        train(parse(description=description, **changes))
    except ModuleNotFoundError as error:
        _fail(2, f"{error.name} is not installed: pip install 'palette-diffusers[train]'")
    except (ValueError, OSError) as error:
        _fail(2, str(error))
    except (FloatingPointError, MemoryError) as error:
        _fail(1, str(error) or "out of memory")
    except torch.AcceleratorError as error:
        advice = "the accelerator failed or is gone; --resume goes on from the last checkpoint:"
        _fail(1, f"{advice} {str(error).partition(chr(10))[0]}")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # told wherever the main process is
            raise
        _fail(1, f"{str(error).strip()} Was memory short? Fewer workers take less; --resume goes on")


def _last(folder: Path) -> str:
    return f"the last state is in {folder}" if any(folder.glob("step-*.pt")) else "no state had been saved yet"


def _fail(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _run(settings: TrainSettings, accelerator: Any, folder: Path) -> tuple[Path, int]:
    """The folder of the pipeline, and the step that was reached."""
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    # cuDNN's attention is known for NaNs in its backward pass on an H100 and H200 (NVIDIA/cudnn-frontend#160 and #1072,
    # pytorch/pytorch#196678); flash attention takes its place
    torch.backends.cuda.enable_cudnn_sdp(False)
    unet, scheduler, default_steps, few_steps = _trainable(settings)
    if settings.cuda_graph and unet.config.dropout:
        raise ValueError(f"cuda_graph is on, but the network's dropout, {unet.config.dropout}, would be replayed too")
    _lay_out(unet, settings)
    if settings.compile:
        unet.compile_repeated_blocks()
    optimizer = _optimizer([p for p in unet.parameters() if p.requires_grad], settings)
    state = last_state(folder) if settings.resume else None
    listed = {str(path): listing(path) for path in _local(settings)} if accelerator.is_main_process else {}
    start, read = 0, torch.zeros(accelerator.num_processes, max(1, settings.workers), 2, dtype=torch.long)
    if state is not None:
        read = check_state(state, read, accelerator)
        unet.load_state_dict(state["unet"])
        start = state["step"]
    read = read[accelerator.process_index].clone()
    place = dict(
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        batch=settings.batch // settings.accumulate // accelerator.num_processes,
        begun=start * settings.accumulate,
        read=read,
    )
    dataset = _dataset(settings, scheduler, bool(unet.config.hole_skip), **place)
    given = batches(dataset, settings, start, accelerator.process_index, accelerator.num_processes, accelerator.device)
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(f"the processes would go on from steps {starts}: they must see one output folder")
    raw, main, precision = unet, accelerator.is_main_process, precision_of(accelerator)
    configuration = {name: v for name, v in unet.config.items() if not name.startswith("_")}  # of `init`, where given
    teacher = _teacher(settings, accelerator.device, precision, raw)
    if settings.distils:  # the noise that the student learns from, and its steps
        names, own = (LEARNT, STRAIGHT) if settings.on_policy else (LEARNT[:1], {})
        learnt = {name: teacher.pipe.scheduler.config[name] for name in names}
        # few steps have no room for new noise
        scheduler = build(type(scheduler), scheduler.config, **learnt, **own, source_eta=None)
    critic: Any = None
    critic_optimizer: Any = None
    judging: list[torch.nn.Parameter] = []
    if settings.adversarial:
        critic = Critic(teacher.pipe.unet, settings.task_list, settings.prediction_type).to(accelerator.device)
        judging = list(critic.parameters())
        options: dict[str, Any] = dict(lr=settings.critic_rate, betas=(0.0, 0.99), fused=torch.cuda.is_available())
        critic_optimizer = torch.optim.Adam(judging, **options)
        if state is not None:
            critic.load_state_dict(state["critic"])
            critic_optimizer.load_state_dict(state["critic_optimizer"])
    sharded, zero = accelerator.is_fsdp2, accelerator.distributed_type == "DEEPSPEED"
    gives = main or sharded  # what is saved, sampled and published
    spare = copy.deepcopy(unet) if sharded and main else None  # to sample with, and to publish
    unet, optimizer = accelerator.prepare(unet, optimizer)
    trained = [p for p in unet.parameters() if p.requires_grad]  # shards of them, under FSDP
    ema = EMAModel(trained, decay=settings.ema, use_ema_warmup=True, power=0.75, foreach=torch.cuda.is_available())
    if state is not None:
        if zero:
            load_optimizer_state(optimizer, trained, state["optimizer"])
        else:
            optimizer.load_state_dict(share_optimizer(state["optimizer"], trained))
        ema.load_state_dict(state["ema"])
        ema.shadow_params = [share(v, p) for v, p in zip(ema.shadow_params, trained, strict=True)]
    if state is not None and accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    ema.to(accelerator.device)
    if main:
        if settings.resume and state is None:
            print(f"{folder} has no checkpoint: the run begins at step 0", file=sys.stderr)
        for path, kept in ({} if state is None else state.get("data", {})).items():
            if listed.get(path, kept) != kept:
                print(f"warning: {path} has other files than the run had before: its samples differ", file=sys.stderr)
        cut_back(folder, start)
        write_text(folder / "settings.json", json.dumps(asdict(settings), indent=2) + "\n")
    accelerator.init_trackers(
        "palette", {k: v for k, v in asdict(settings).items() if k != "unet"}, {"wandb": {"dir": settings.output}}
    )

    stop: list[int] = []
    before = {number: signal.signal(number, lambda n, _: stop.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}

    def save(step: int) -> None:
        everywhere = accelerator.gather(read[None].to(accelerator.device)).cpu() if settings.streaming else None
        parts: dict[str, Any] = {}
        stepped = optimizer_state(optimizer, trained, main) if zero else optimizer.state_dict() if gives else {}
        if gives:
            parts = whole(dict(unet=raw.state_dict(), optimizer=stepped, ema=ema.state_dict()), main)
        if main:
            parts["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            if settings.streaming:
                parts["read"] = everywhere
            if critic is not None:
                parts |= dict(critic=critic.state_dict(), critic_optimizer=critic_optimizer.state_dict())
            world = dict(precision=precision, processes=accelerator.num_processes, data=listed)
            save_state(folder, step, settings.keep, **world, **parts)

    @contextmanager
    def averaged() -> Iterator[PaletteUNet2DModel | None]:
        """The network with the averaged weights; None in processes that only give their shards to it."""
        if sharded:
            weights, averages = whole(raw.state_dict(), main), whole(ema.shadow_params, main)
            if spare is not None:
                spare.load_state_dict(weights)
                for p, average in zip((p for p in spare.parameters() if p.requires_grad), averages, strict=True):
                    p.data.copy_(average)
                spare.eval().to(accelerator.device)
            yield spare
            if spare is not None:
                spare.cpu()
            return
        ema.store(trained)
        ema.copy_to(trained)
        yield raw.eval()
        raw.train()
        ema.restore(trained)

    def sheet(step: int) -> None:
        with averaged() as network:
            if network is not None:
                steps = 1 if settings.regression else settings.validate_steps
                draw_samples(network, scheduler, dataset, steps, folder / "samples" / f"step-{step:07d}.png")

    begin, step, in_a_row = time.monotonic(), start, 0
    shares = torch.tensor(_by_task(settings, "loss_weights"), device=accelerator.device)
    tally, later = Tally(settings.task_list, folder / "log.jsonl"), Later(accelerator.device.type == "cuda")

    def check(before: int | None = None) -> None:
        """Counts the losses that have come in, and stops at one that is not finite, or gradients that are not."""
        nonlocal in_a_row
        for at, numbers in later.take(before):
            if "losses" in numbers:
                tally.add(numbers.pop("losses"), numbers)
            if not tally.finite():
                raise FloatingPointError(f"the loss is not finite at step {at}: {_last(folder)}")
            if "norm" in numbers:
                good = bool(torch.isfinite(numbers["norm"]))
                in_a_row = 0 if good else in_a_row + 1
                tally.left_out += not good
                if in_a_row > settings.bad_steps:
                    raise FloatingPointError(f"the gradient is not finite at step {at}: {_last(folder)}")

    def work(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Losses of each sample, and how well a critic tells it, (1 or 2, B); their gradients are added to the
        parameters'."""
        with autocast(accelerator):
            losses, output, noisy = _losses(unet, batch, settings)
        loss = (losses * shares[batch["task"]] * batch.get("taught", 1.0)).mean()
        numbers = [losses.detach()]
        if critic is not None:
            student, own, right = critic.compare(critic.picture(output, noisy, batch), batch)
            loss = loss + settings.adversarial * student.mean()
            (own.mean() / settings.accumulate).backward()
            numbers.append(right)
        if zero:
            unet.backward(loss)
            unet.step()  # clips and steps at the last part only
        else:
            accelerator.backward(loss / settings.accumulate)
        return torch.stack(numbers)

    if settings.cuda_graph:
        work = Replay(work, [*trained, *judging])
    unet.train()
    bar = tqdm(total=settings.steps, initial=start, disable=not (main and sys.stderr.isatty()), unit="step")
    try:
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            for part in range(settings.accumulate):
                with tally.waiting():
                    batch = next(given)
                number = step * settings.accumulate + part
                if settings.streaming:
                    read[number % len(read)] = batch.pop("read")[-1].cpu()
                # dropout, too, is a function of the position; seeded here, since a loader's first batch draws numbers
                key = np.random.SeedSequence((settings.seed, 3, number, accelerator.process_index))
                torch.manual_seed(int(key.generate_state(1)[0]))
                last = part == settings.accumulate - 1
                with nullcontext() if last or zero else accelerator.no_sync(unet):
                    if teacher:
                        photographs = batch["clean"]
                        with autocast(accelerator):
                            if settings.distils:
                                batch = teacher.pairs(batch, alone=step % settings.teacher_every > 0)
                            else:
                                batch = teacher.predictions(batch)
                        if critic is not None:
                            batch = critic.draw(batch, photographs.repeat_interleave(settings.levels, 0))
                    numbers = dict(zip(("losses", "told"), work(batch), strict=False))
                counted = {name: batch[name] for name in COUNTED if name in batch}
                if settings.regression:  # the level that the network was told
                    counted["gamma"] = torch.full_like(batch["gamma"], regression_gamma())
                later.put(step, **numbers, **counted)
            norm = gradient_norm(unet) if zero else accelerator.clip_grad_norm_(trained, settings.clip or math.inf)
            # the same on every process; fp16's scaler expects some that are not finite, and skips those steps
            if accelerator.scaler is None:
                norm = torch.as_tensor(whole(norm))
                later.put(step, norm=norm)
            check(before=step)
            if not settings.bad_steps or accelerator.scaler is not None or _may_step(optimizer, norm, sharded):
                optimizer.step()
            optimizer.zero_grad()
            if critic is not None:
                for p in judging:
                    p.grad = accelerator.reduce(p.grad, "mean")
                if _may_step(critic_optimizer, torch.nn.utils.clip_grad_norm_(judging, CRITIC_CLIP), False):
                    critic_optimizer.step()
                critic_optimizer.zero_grad()
            ema.step(trained)
            step += 1
            bar.update()
            if step % settings.log_every == 0 or step % settings.save_every == 0:
                check()
            if step % settings.log_every == 0:
                line = tally.line(accelerator, step)
                bar.set_postfix({k: line[k] for k in ("loss", "samples_per_second", "waiting")})
                figures = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
                accelerator.log(figures, step=step)
                if main and bar.disable:
                    print(
                        json.dumps({k: line[k] for k in ("step", "loss", "samples_per_second", "waiting")}), flush=True
                    )
            if step % settings.save_every == 0:
                save(step)
            if settings.validate_every and step % settings.validate_every == 0 and gives:
                sheet(step)
            over = bool(stop) or (settings.max_hours > 0 and time.monotonic() - begin > settings.max_hours * 3600)
            if accelerator.num_processes > 1:  # all stop when one does
                if over:
                    accelerator.set_trigger()
                over = accelerator.check_trigger()
            if over:
                break
        check()
        if step > start and step % settings.log_every:  # what the last line of the log does not have
            tally.line(accelerator, step)
        if step == start or step % settings.save_every:
            save(step)
    except FloatingPointError:
        if main:
            write_report(folder, replace(settings, unet=configuration))
        raise
    finally:
        given.close()
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    final = folder / "pipeline"
    if gives:
        with averaged() as network:
            if network is not None:
                _publish(
                    network, scheduler, default_steps, few_steps, replace(settings, precision=precision), final, step
                )
    if main:
        write_report(folder, replace(settings, unet=configuration))
        if step < settings.steps:
            again = shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
            print(f"stopped at step {step} of {settings.steps}; to go on: accelerate launch {again}", flush=True)
        print(f"step {step}: the pipeline is in {final}, the report in {folder / 'report.html'}", flush=True)
    # while the process group is there: the network's end would otherwise be the group's too, which waits for a thread
    # that may be waiting for the interpreter
    unet, optimizer = accelerator.free_memory(unet, optimizer)
    accelerator.end_training()
    return final, step


def _publish(
    unet: PaletteUNet2DModel, scheduler: PaletteScheduler, default_steps: int, few_steps: int | None,
    settings: TrainSettings, final: Path, step: int,
) -> None:  # fmt: skip
    """The pipeline with its card, written beside and renamed; adapters are merged, and kept on their own too."""
    from .pipeline import PalettePipeline

    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if settings.lora_rank:
            unet.to(memory_format=torch.contiguous_format)  # which alone safetensors writes; a pipeline's saving knows
            unet.save_lora_adapter(part / "lora")
            unet.fuse_lora()
            unet.unload_lora()
        tasks = settings.task_list
        pipe = PalettePipeline(
            unet, scheduler, tasks=tasks, default_task=tasks[0], default_steps=default_steps, few_steps=few_steps
        )
        pipe.save_pretrained(part)
        licence = licences(settings)
        if licence:
            (part / "LICENSE").write_text(licence)
        write_card(part / "README.md", settings, step, sum(p.numel() for p in unet.parameters()), bool(licence))
        if _alike(part, final):  # nothing was trained since: its card may have been edited
            shutil.rmtree(part)
            return
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, SafetensorError):  # its words for a full disk
            raise OSError(f"{final} can't be written: {error}") from None
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)


def _alike(one: Path, other: Path) -> bool:
    """Whether a pipeline is there already, whatever its texts."""
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    files = [path for path in files if path.name not in ("README.md", "LICENSE")]
    return all((other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False) for name in files)
