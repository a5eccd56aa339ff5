"""Everything that a training run depends on: one frozen dataclass, its presets, and its command line."""

import argparse
import difflib
import inspect
import json
import math
import numbers
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

SMALL_BLOCKS = dict(
    down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    resample_type="conv",
)
CHANGES = "the network's configuration; on the command line changes to the preset's, as JSON: {\"dropout\": 0.1}"
ADM = "ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"

# what may differ between a run and its continuation: nothing that changes a sample or the network, or a gradient by
# more than rounding; `bad_steps` leaves out what is none
FREE = (
    "output", "resume", "steps", "decay", "workers", "save_every", "keep", "log_every", "validate_every",
    "validate_steps", "max_hours", "tracker", "push_to_hub", "compile", "checkpointing", "channels_last", "fused",
    "cuda_graph", "bad_steps", "dry_run",
)  # fmt: skip


def _adm(widths: list[int], attention: int) -> dict:
    """ADM's blocks with attention in the last `attention` levels."""
    plain = len(widths) - attention
    return dict(
        block_out_channels=widths,
        down_block_types=[ADM[0]] * plain + [ADM[1]] * attention,
        up_block_types=[ADM[2]] * attention + [ADM[3]] * plain,
    )


def _field(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run depends on; `help` is in each field's metadata.

    Raises:
        ValueError: a value out of range; the message names it and what was expected.
    """

    # data
    data: str = _field("", "folders of parquet files, *.tar shards or images, or Hub ids; PATH@WEIGHT,PATH mixes")
    column: str = _field("", "column of the images (the targets, for pairs); default: the first that holds images")
    source_column: str = _field("", "column of the source images: trains a translation of pairs, the task `paired`")
    crops: str = _field("", "full-size photographs, for JPEG targets: folders or Hub ids, comma-separated")
    crop_share: float = _field(0.3, "share of crops of those photographs in the other tasks")
    streaming: bool = _field(False, "read the images in order as training goes, instead of fetching them first")
    shuffle_buffer: int = _field(0, "rows of a stream among which the next one is drawn; 0 = its own order")
    strict: bool = _field(False, "stop at the first image that can't be decoded, instead of counting it")
    size: int = _field(64, "pixels a side")
    # tasks and objective
    tasks: str = _field("colorization,inpainting,uncropping,jpeg_restoration", "task names, comma-separated")
    task_weights: str = _field("", "how often tasks are drawn, TASK=NUMBER,TASK=NUMBER; 1 for the others")
    loss_weights: str = _field("", "factors on the tasks' losses (not a critic's), TASK=NUMBER,TASK=NUMBER; else 1")
    prediction_type: str = _field("epsilon", "what the network predicts", ("epsilon", "v_prediction", "sample"))
    loss: str = _field("l2", "l2 (the paper), l1 or huber", ("l2", "l1", "huber"))
    snr_gamma: float = _field(0.0, "min-SNR weighting's gamma (Hang et al. 2023), 5 is usual; 0 = off")
    weight_cap: float = _field(0.0, "cap on the weight of an error in the picture, SNR + 1 for v; 0 = none")
    regression: bool = _field(False, "the regression twin: zeros as noisy image, the picture in one step")
    condition_dropout: float = _field(0.0, "share of samples whose source is replaced by noise")
    # distillation
    teacher: str = _field("", "learn from this pipeline (see learns): starter, a folder or Hub id")
    learns: str = _field(
        "pictures",
        "of the teacher: pictures (for few steps), or predictions at each noise level (for as many steps)",
        ("pictures", "predictions"),
    )
    guide: str = _field("", "lead the teacher away from what this worse pipeline, an earlier state of it, predicts")
    guidance: float = _field(3.0, "how far: guide + guidance x (teacher - guide); 1 = not at all")
    guided_from: float = _field(-9.0, "the lowest log-SNR where it is led away")
    guided_to: float = _field(4.0, "the highest")
    teacher_steps: int = _field(0, "network evaluations of each of those pictures; 0 = the teacher's default")
    levels: int = _field(4, "noise levels at which each of those pictures is trained")
    student_steps: int = _field(4, "default steps of the student that is published")
    on_policy: bool = _field(False, "the teacher goes on from where the student's own steps lead, up to that many")
    adversarial: float = _field(0.0, "weight of a critic that compares pictures with photographs; 0 = none")
    critic_rate: float = _field(1e-3, "learning rate of that critic")
    teacher_every: int = _field(1, "the teacher goes on at each so many-th step; in the others the critic judges alone")
    # optimiser
    steps: int = _field(1_000_000, "optimiser steps in all")
    batch: int = _field(1024, "samples an optimiser step, over all processes and accumulated parts")
    accumulate: int = _field(1, "parts that an optimiser step's batch is computed in")
    optimizer: str = _field("adamw", "adamw, adam, or adamw8bit (needs bitsandbytes)", ("adamw", "adam", "adamw8bit"))
    rate: float = _field(1e-4, "learning rate")
    weight_decay: float = _field(0.0, "decoupled weight decay")
    warmup: int = _field(10_000, "steps of linear warm-up")
    schedule: str = _field("constant", "after the warm-up: constant (the paper) or cosine", ("constant", "cosine"))
    decay: int = _field(0, "last steps, over which a constant learning rate falls linearly to 0")
    ema: float = _field(0.9999, "highest decay of the weights' moving average, per step")
    clip: float = _field(1.0, "largest norm of the gradient")
    bad_steps: int = _field(0, "so many steps in a row are left out if their gradient is not finite; one more stops")
    # hardware
    precision: str = _field("", "no, bf16 or fp16; default: as Accelerate is configured", ("", "no", "bf16", "fp16"))
    checkpointing: bool = _field(False, "recompute activations in the backward pass: less memory, more time")
    channels_last: bool = _field(False, "channels-last memory layout")
    compile: bool = _field(False, "torch.compile the repeated blocks")
    fused: bool = _field(False, "fewer passes over memory in residual blocks, on a GPU in half precision")
    cuda_graph: bool = _field(False, "record a step's work once and replay it, on one GPU")
    workers: int = _field(1, "processes that prepare samples, for each training process")
    # the run
    output: str = _field("runs/palette", "folder of the run")
    seed: int = _field(0, "of everything")
    init: str = _field("", "start from the weights of this pipeline: a folder or Hub id")
    lora_rank: int = _field(0, "train low-rank adapters of this rank only (needs peft and --init); 0 = all weights")
    lora_init: str = _field("", "start from the adapters in this folder (of rank lora_rank), instead of new ones")
    resume: bool = _field(False, "go on from the last checkpoint in the output folder")
    save_every: int = _field(500, "steps between checkpoints")
    keep: int = _field(2, "checkpoints that are kept")
    log_every: int = _field(50, "steps between lines of the log")
    validate_every: int = _field(1000, "steps between sheets of samples; 0 = none")
    validate_steps: int = _field(20, "network evaluations of each of those samples")
    max_hours: float = _field(0.0, "stop, saved, after this many hours; 0 = never")
    tracker: str = _field(
        "auto", "log to this too; auto: tensorboard if installed", ("auto", "none", "tensorboard", "wandb", "trackio")
    )
    push_to_hub: str = _field("", "Hub id that the finished pipeline is uploaded to")
    dry_run: bool = _field(False, "only say what the run will take, and draw one degraded batch")
    unet: dict = field(default_factory=dict, metadata={"help": CHANGES, "choices": ()})

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_kind(entry.name, getattr(self, entry.name), _kind(entry))
        _check_network(self.unet)
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{entry.name} is {value!r}, expected one of {', '.join(c for c in choices if c)}")
        for name in (
            "size", "steps", "batch", "accumulate", "save_every", "keep", "log_every", "validate_steps", "levels",
            "student_steps", "teacher_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in (
            "seed", "warmup", "decay", "workers", "validate_every", "lora_rank", "snr_gamma", "weight_cap", "max_hours",
            "clip", "shuffle_buffer", "teacher_steps", "bad_steps", "adversarial",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected below 2**63")
        for name in ("condition_dropout", "crop_share", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to below 1")
        if self.shuffle_buffer and not self.streaming:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}, but nothing streams: give streaming too")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}, expected above 0")
        if not self.critic_rate > 0:
            raise ValueError(f"critic_rate is {self.critic_rate}, expected above 0")
        self._check_tasks()
        if self.regression and self.prediction_type == "epsilon":
            raise ValueError("a regression twin has no noise to predict: prediction_type is 'epsilon'")
        if self.teacher and self.regression:
            raise ValueError("a regression twin has no teacher: give teacher or regression")
        if self.teacher and self.condition_dropout:
            raise ValueError(f"condition_dropout is {self.condition_dropout}, but a teacher's source is never noise")
        self._check_guide()
        if self.on_policy and (not self.teacher or self.student_steps < 2):
            raise ValueError(
                f"on_policy is on, expected a teacher ({self.teacher!r}) and student_steps ({self.student_steps}) of 2 "
                "or more; --no-on-policy leaves it out"
            )
        if self.adversarial and not self.teacher:
            raise ValueError(f"adversarial is {self.adversarial}, but there is no teacher, whose encoder a critic has")
        if self.teacher_every > 1 and not (self.adversarial and self.on_policy):
            raise ValueError(f"teacher_every is {self.teacher_every}, expected adversarial and on_policy with it, or 1")
        if self.teacher_every > 1 and self.levels > 1:  # further points of a line would show the photograph
            raise ValueError(f"teacher_every is {self.teacher_every} and levels {self.levels}, expected 1 of either")
        if self.prediction_type != "v_prediction" and self.unet.get("condition_skip") and not self.init:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, but the network's condition_skip needs v_prediction: "
                'give another preset, or unet with "condition_skip": 0, "hole_skip": 0'
            )
        if self.batch % self.accumulate:
            raise ValueError(f"batch is {self.batch}, expected a multiple of accumulate, {self.accumulate}")
        if self.schedule == "cosine" and self.decay:
            raise ValueError(
                f"decay is {self.decay}, but schedule 'cosine' falls by itself: give decay 0, or 'constant'"
            )
        if self.crops and self.source_column:
            raise ValueError(f"crops is {self.crops!r}, but pairs (source_column) are never made of them: leave it out")
        if self.fused and (self.compile or not self.channels_last):
            raise ValueError("fused is on, expected channels_last with it and compile off; --no-fused leaves it out")
        if self.lora_rank and not self.init:
            raise ValueError("lora_rank needs a checkpoint to adapt: name it by init")
        if self.lora_init and not self.lora_rank:
            raise ValueError(f"lora_init is {self.lora_init!r}, but there are no adapters: give lora_rank too")

    @property
    def distils(self) -> bool:
        """Whether a student of few steps is trained; a network that learns predictions keeps its steps."""
        return bool(self.teacher) and self.learns == "pictures"

    def _check_guide(self) -> None:
        if self.guide and not self.teacher:
            raise ValueError(f"guide is {self.guide!r}, but there is no teacher that it could lead")
        if not self.guided_from < self.guided_to:
            raise ValueError(f"guided_from is {self.guided_from}, expected below guided_to, {self.guided_to}")
        if self.learns == "pictures":
            return
        if not self.teacher:
            raise ValueError(f"learns is {self.learns!r}, but there is no teacher")
        for name in ("on_policy", "adversarial"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but learns is 'predictions': it needs 'pictures'")

    def _check_tasks(self) -> None:
        tasks, drawn = self.task_list, self.numbers("task_weights")
        self.numbers("loss_weights")
        if not tasks:
            raise ValueError("tasks is empty, expected at least one name")
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks is {self.tasks!r}, expected each once; task_weights says how often")
        others = [name for name in drawn if name not in tasks]
        if others:
            raise ValueError(f"task_weights has {', '.join(others)}, expected tasks of the run: {', '.join(tasks)}")
        if not any(drawn.get(name, 1.0) for name in tasks):
            raise ValueError(f"task_weights is {self.task_weights!r}, expected a task that is drawn")

    def numbers(self, name: str) -> dict[str, float]:
        """A setting "task=2,other=0.5" => the numbers by task, those that are given."""
        given = {}
        for part in filter(None, (part.strip() for part in getattr(self, name).split(","))):
            task, _, value = part.partition("=")
            try:
                given[task.strip()] = float(value)
            except ValueError:
                raise ValueError(f"{name} has {part!r}, expected TASK=NUMBER") from None
            if not 0 <= given[task.strip()] < math.inf:
                raise ValueError(f"{name} has {part!r}, expected a finite number of at least 0")
        return given

    @property
    def task_list(self) -> list[str]:
        return ["paired"] if self.source_column else [name.strip() for name in self.tasks.split(",") if name.strip()]


_STARTER = dict(
    sample_size=64, patch_size=2, condition_skip=0.2, hole_skip=0.5, block_out_channels=[48, 96, 192],
    layers_per_block=1, norm_num_groups=16, attention_head_dim=64, **SMALL_BLOCKS,
)  # fmt: skip
_TINY = _STARTER | dict(block_out_channels=[24, 48, 96], norm_num_groups=8, attention_head_dim=32)
_PLAIN = _TINY | dict(
    block_out_channels=[24, 48, 104], add_attention=False,
    down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
)  # fmt: skip
# for a GPU: half again as deep and wide, with attention at 16x16 too
_DEEP = _STARTER | dict(
    block_out_channels=[64, 96, 192], layers_per_block=2, attention_head_dim=32,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
# a task whose source says almost all has small losses, and would be learnt last
_CAP = dict(weight_cap=10.0, loss_weights="colorization=2,uncropping=0.7,jpeg_restoration=3")
_FAST = dict(precision="bf16", channels_last=True, fused=True, cuda_graph=True, workers=14)
_GPU = _CAP | _FAST | dict(decay=1_700, crop_share=0.15, bad_steps=3)
_TUNE = dict(weight_cap=10.0, init="starter", save_every=100, validate_every=100, log_every=10)
_DISTILL = dict(loss="huber", init="starter", teacher="starter", on_policy=True, levels=1, **_CAP)
_V = "v_prediction"

# preset                  size batch      steps  rate  warmup  ema     prediction network and the rest
PRESETS: dict[str, tuple] = {
    "starter-64":           (64,   32,    20_000, 8e-4,    150, 0.999,  _V,        _STARTER, _CAP),
    "starter-64-gpu":       (64,  256,     4_800, 1e-3,    300, 0.9995, _V,        _DEEP, _GPU),
    "finetune-64":          (64,   16,       300, 2e-4,     20, 0.99,   _V,        _STARTER, _TUNE),
    "distill-64":           (64,   16,     2_000, 3e-4,    100, 0.998,  _V,        _STARTER, _DISTILL),
    "tiny-64":              (64,   32,     6_000, 8e-4,    150, 0.999,  _V,        _TINY, _CAP),
    "tiny-64-l1":           (64,   32,     6_000, 8e-4,    150, 0.999,  _V,        _TINY, _CAP | dict(loss="l1")),
    "tiny-64-no-attention": (64,   32,     6_000, 8e-4,    150, 0.999,  _V,        _PLAIN, _CAP),
    "tiny-64-regression":   (64,   32,     6_000, 8e-4,    150, 0.999,  _V,        _TINY, _CAP | dict(regression=True)),
    "palette-64":           (64,  256,   300_000, 1e-4, 10_000, 0.9999, "epsilon",
                             dict(sample_size=64, **_adm([128, 256, 384, 512], 3)), {}),
    "palette-128":          (128, 256,   500_000, 1e-4, 10_000, 0.9999, "epsilon",
                             dict(sample_size=128, **_adm([256, 256, 512, 768, 1024], 3)), {}),
    "palette-256":          (256, 1024, 1_000_000, 1e-4, 10_000, 0.9999, "epsilon",
                             dict(sample_size=256, **_adm([256, 256, 512, 512, 1024, 1024], 3)), {}),
}  # fmt: skip


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def preset(name: str) -> TrainSettings:
    """The settings of a preset.

    Raises:
        ValueError: no preset has this name; the message lists them.

    >>> preset("palette-256").batch
    1024
    """
    if name not in PRESETS:
        hint = _nearest(name, list(PRESETS))
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}{hint}")
    size, batch, steps, rate, warmup, ema, prediction_type, unet, rest = PRESETS[name]
    return replace(
        TrainSettings(),
        size=size, batch=batch, steps=steps, rate=rate, warmup=warmup, ema=ema,
        prediction_type=prediction_type, unet=unet, **rest,
    )  # fmt: skip


KINDS: dict[str, tuple[Any, str]] = {
    "int": (numbers.Integral, "a whole number"), "float": (numbers.Real, "a finite number"), "bool": (bool, "a bool"),
    "str": (str, "text"),
}  # fmt: skip


def _kind(entry: Any) -> str:
    """The name of a field's type."""
    return getattr(entry.type, "__name__", str(entry.type))


def _check_kind(name: str, value: Any, kind: str) -> None:
    """Raises:
    ValueError: a value of another type, or a number that is not finite.
    """
    if kind not in KINDS:
        return
    expected, words = KINDS[kind]
    fits = isinstance(value, expected) and isinstance(value, bool) == (kind == "bool")
    if not fits or (kind == "float" and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}, expected {words}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None


def _check_network(unet: Any) -> None:
    """Raises:
    ValueError: what is no configuration of a network, or has a name that the network doesn't know.
    """
    from .unet import PaletteUNet2DModel

    if not isinstance(unet, dict):
        raise ValueError(f"unet is {unet!r}, expected the network's configuration as JSON, {{NAME: VALUE}}")
    known = [name for name in inspect.signature(PaletteUNet2DModel.__init__).parameters if name != "self"]
    for name in unet:
        if name not in known:
            raise ValueError(f"unet has {name!r}, expected some of {', '.join(known)}{_nearest(name, known)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")]
        hint = _nearest(unknown[0], list(self._option_string_actions)) if "unrecognized" in message and unknown else ""
        print(f"error: {message}{hint} (--help lists all)", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str] | None = None, description: str | None = None, **changes: Any) -> TrainSettings:
    """Command line => settings: those of `--preset`, then `changes`, then each option that is given.

    >>> parse(["--preset", "palette-64", "--batch", "8"]).batch
    8
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="starter-64", help=f"one of {', '.join(PRESETS)}; [its values] are below")
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="starter-64")
    shown = vars(preset(first.parse_known_args(arguments)[0].preset)) | changes
    for entry in fields(TrainSettings):
        name = _kind(entry)
        kind: Any = {"int": int, "float": float, "dict": _json}.get(name, str)
        flag = "--" + entry.name.replace("_", "-")
        value = "" if name in ("bool", "dict") else shown[entry.name]
        text = entry.metadata["help"].replace("%", "%%") + ("" if value == "" else f" [{value}]")
        if name == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, default=None, help=text)
    options = vars(parser.parse_args(arguments))
    start = preset(options.pop("preset"))
    given = {name: value for name, value in options.items() if value is not None}
    init = given.get("init", changes.get("init", start.init))
    if "unet" in given and init:
        raise ValueError(f"unet is given, but the network is that of init, {init!r}: leave it out, or give --init ''")
    if isinstance(given.get("unet"), dict):  # what is not given stays as the preset has it
        given["unet"] = changes.get("unet", start.unet) | given["unet"]
    settings = replace(start, **(changes | given))
    if "tasks" in given and settings.source_column:
        raise ValueError(f"tasks is {given['tasks']!r}, but pairs (source_column) have the task 'paired': leave it out")
    return settings
