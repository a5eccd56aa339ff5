"""`PalettePipeline`: a photograph and a task => the photograph, mended.

Images are (B, 3, H, W), RGB, [-1, 1]; masks (1, 1, H, W), 1 = generate.
"""

import copy
import inspect
import logging
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from . import canvas, sizes
from .canvas import ImageInput, LossWarning, Picture
from .checkpoint import FORMAT, check_folder, even_modes, fetch, is_local, licence, merge_adapters, read_index
from .coefficients import find_coefficients
from .color import chroma, even_chroma, luma
from .hints import Hints, Spread, read_hints
from .machine import give_memory_back
from .masks import border_mask, extend
from .norms import ChannelsLastGroupNorm, lay_out
from .optimize import Optimized, optimize
from .scheduler import (
    PaletteScheduler,
    calm,
    check_solver,
    diffuse,
    noise_level,
    output_for,
    predicted_original,
    variance_exploding,
)
from .speed import FAST, check, solver_for
from .tasks import Colorization, Given, JPEGRestoration, Task, get_task, network_condition
from .texture import add_texture, patch_size
from .unet import PaletteUNet2DModel

STARTER = Path(__file__).resolve().with_name("starter")
STUDENT = STARTER.with_name("starter-few-steps")
SHIPPED = {path.name: path for path in (STARTER, STUDENT)}  # a Hub id has a slash
MAX_FRACTION = 10  # of a side that a border may have: 64.0 is meant to be pixels
ACCESS = ("token", "cache_dir", "local_files_only", "variant")  # of a checkpoint, which hold for its student, too
BATCH = 16  # samples of a batch, at most
AT_ONCE = 8_000_000  # pixels of variations that are made together
EVENED = 0.7311  # gamma up to which chroma is evened out: log-SNR 1
SHRUNK_EVENED = 0.8808  # the same of photographs that were made smaller, whose regions are larger: log-SNR 2
SHRUNK_CONTRAST = 0.85  # the share of the contrast above 1 that those get
CONTRASTED = 4  # steps up to there of which `chroma_contrast` is told; of more, each has less: measured from 2 to 9
HIDDEN = 512  # pixels of the longer side at which what lies under transparency is made up
STRIP = 1 / 16  # of the model's size, that a border is extended by at a time: far from what is known, it makes haze
REFINE_FROM = 2.5  # log-SNR at which finer levels start from the coarser picture
FAR = 6.0  # log-SNR; of two steps a task that starts at -4 would take the last alone, which sees no damage any more
SOONER = 1.5  # log-SNR by which the last of few steps may come before that; more would leave grain


@dataclass
class PalettePipelineOutput(BaseOutput):
    """`images`: the pictures, those of one input after another."""

    images: list[Image.Image] | np.ndarray | torch.Tensor


def evaluate(unet: torch.nn.Module, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """A network's output, in smaller batches where memory ends."""
    return sizes.halving(lambda *given: unet(*given, return_dict=False)[0])(sample, gamma, condition)


class PalettePipeline(DiffusionPipeline):
    """Image-to-image diffusion for colorization, inpainting, uncropping, JPEG restoration and a user's own tasks.

    Args:
        unet: a `PaletteUNet2DModel`.
        scheduler: a `PaletteScheduler`, or another diffusers solver built from its configuration.
        tasks: the names of the tasks that the network was trained for; one string separates them by commas.
        default_task: the one that is used where none is named.
        default_steps: network evaluations where no number is given.
        student: the name, as `from_pretrained` takes it, of this checkpoint's student for few steps, which
            `speed("fast")` takes.
        few_steps: of such a student, the most steps that it was trained for.

    >>> pipe = PalettePipeline.from_pretrained()  # doctest: +SKIP
    >>> pipe("photo.jpg", task="colorization").images[0].save("photo-colorized.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["sample", "pred_original_sample"]

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: PaletteScheduler,
        tasks: str | list[str] | tuple[str, ...] = ("colorization", "inpainting", "uncropping", "jpeg_restoration"),
        default_task: str = "colorization",
        default_steps: int = 20,
        student: str | None = None,
        few_steps: int | None = None,
    ):
        super().__init__()
        if not isinstance(student, str | None):
            raise ValueError(f"student is {student!r}, expected a checkpoint's name or None")
        if few_steps is not None and (type(few_steps) is not int or few_steps < 1):
            raise ValueError(f"few_steps is {few_steps!r}, expected a whole number of at least 1, or None")
        self.register_modules(unet=unet, scheduler=scheduler)
        tasks = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        self.register_to_config(
            tasks=tasks, default_task=default_task, default_steps=default_steps, student=student, few_steps=few_steps,
            _format=FORMAT,
        )  # fmt: skip
        self._taught = unet  # the network that the student is of
        self._before_student: tuple[Any, ...] | None = None
        self._loaded_with: dict[str, Any] = {}
        self._licence: str | None = None  # of the weights

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike | None = None, **kwargs: Any
    ) -> "PalettePipeline":
        """As diffusers' own; without a name, the starter checkpoint that ships with the package (no network). The
        names "starter" and "starter-few-steps", its student for 1 to 4 steps, mean the shipped ones. A folder that has
        the variant "fp16" only is loaded from it, in float32 unless `dtype` says otherwise.

        A repository's own code is never run here: its weights and configuration are read by this package.

        Raises:
            OSError: a path that is no folder with a model_index.json; a repository that isn't found, is gated, or
                is neither in the cache nor reached. ValueError: another class, a format that is too new, no weights
                of this variant.
        """
        name = os.fspath("starter" if pretrained_model_name_or_path is None else pretrained_model_name_or_path)
        name = os.fspath(SHIPPED.get(name, name))
        if "torch_dtype" in kwargs:  # the library's older name for it
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if "unet" in kwargs:  # another network than the one whose student is named
            kwargs.setdefault("student", None)
            kwargs.setdefault("few_steps", None)
        given = "unet" in kwargs
        if Path(name).resolve() == STUDENT:  # is the starter, with adapters; has no weights of its own
            variant = kwargs.pop("variant", "fp16")
            if "unet" not in kwargs:
                unet = PaletteUNet2DModel.from_pretrained(
                    STARTER, subfolder="unet", variant=variant, dtype=torch.float32
                )
                merge_adapters(unet, STUDENT / "lora" / "pytorch_lora_weights.safetensors")
                kwargs["unet"] = torch.nn.Module.to(unet, kwargs.get("dtype", torch.float32))
        if is_local(name) and "unet" not in kwargs:
            asked = kwargs.get("variant")
            kwargs["variant"] = check_folder(Path(name), asked)
            if kwargs["variant"] != asked:
                kwargs.setdefault("dtype", torch.float32)
        pipe = super().from_pretrained(name, **kwargs)
        pipe._loaded_with = {key: kwargs[key] for key in ACCESS if kwargs.get(key)}
        pipe._licence = None if given else licence(name, kwargs.get("revision"), kwargs.get("cache_dir"))
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:  # type: ignore[override]
        """The repository's files in the cache: `from_pretrained` without loading. Arguments as `checkpoint.fetch`."""
        known = inspect.signature(fetch).parameters
        return str(fetch(pretrained_model_name, **{name: value for name, value in kwargs.items() if name in known}))

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:  # type: ignore[override]
        """As diffusers' own, for a pipeline that was published with its code as well."""
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        classes = {base.__name__ for base in cls.__mro__}
        modules = {component.__name__: component.__module__ for component in (PaletteUNet2DModel, PaletteScheduler)}
        return read_index(index, classes, modules, str(pretrained_model_name_or_path))

    def speed(self, name: str) -> "PalettePipeline":
        """Solver and steps by a name, "fast", "balanced" or "best" (`speed.SPEEDS`); `save_pretrained` keeps them.

        "fast" changes to the checkpoint's student, where it names one: its network, scheduler and steps, until
        another name is chosen (both networks stay in memory). A pipeline that is a student (`few_steps`) stays as it
        is, whatever the name. What was made of the network since then keeps its own weights: another network in its
        place (`optimize` puts one there), or adapters that are attached; of one whose weights were changed in place,
        say `register_to_config(student=None)`.

        Raises:
            ValueError: no such name; the network is offloaded. OSError, ValueError: the student can't be loaded.
                Nothing has changed then.
        """
        check(name)
        if name == FAST and (few := self.load_student()):
            before = self.unet, self.components["scheduler"], self.config.student, self._licence
            self._before_student = *before, few.unet
            self._licence = few._licence
            self.register_modules(**few.components)
            steps, most = few.config.default_steps, few.config.few_steps
            self.register_to_config(default_steps=steps, student=None, few_steps=most)
            return self
        if name != FAST and self._before_student:
            unet, scheduler, student, terms, few_unet = self._before_student
            self._before_student = None
            if self._is_still(few_unet):
                # torch's own, since diffusers' warns of modules to be kept in float32, where there are none
                unet = torch.nn.Module.to(unet, self.unet.device, self.unet.dtype)
                self.register_modules(unet=unet, scheduler=scheduler)
                self.register_to_config(student=student, few_steps=None)
                self._licence = terms
        if self.config.few_steps is None:
            self.scheduler, steps = solver_for(name, self.components["scheduler"].config)
            self.register_to_config(default_steps=steps)
        elif name != FAST:
            message = "speed %r changes nothing: this is a student of at most %d steps"
            logging.getLogger(__name__).warning(message, name, self.config.few_steps)
        return self

    def load_student(self) -> "PalettePipeline | None":
        """The student for few steps that this checkpoint names, on the same device and in the same dtype and layout;
        None where it names none, or has another network now than the one it was loaded with.

        Raises:
            OSError, ValueError: it can't be loaded, as of `from_pretrained`, or lacks a task of this checkpoint's.
            ValueError: the network is offloaded.
        """
        name = self.config.student
        if name is None:
            return None
        if not self._is_still(self._taught):
            message = "the network was changed since it was loaded: %s is not its student"
            logging.getLogger(__name__).warning(message, name)
            return None
        if name in SHIPPED and not SHIPPED[name].is_dir():  # this code is a published repository's
            logging.getLogger(__name__).warning("the student %s ships with the package palette-diffusers only", name)
            return None
        device = self.unet.device
        if device.type == "meta" or hasattr(self.unet, "_hf_hook"):
            raise ValueError(f"the network is offloaded (to {device.type}): choose a speed before")
        access = {"dtype": self.unet.dtype} | self._loaded_with
        try:
            student = type(self).from_pretrained(name, **access)
        except ValueError:  # it may not have its teacher's variant
            if not access.pop("variant", None):
                raise
            student = type(self).from_pretrained(name, **access)
        student.to(device, silence_dtype_warnings=True)
        missing = [task for task in self.config.tasks if task not in student.config.tasks]
        if missing:
            raise ValueError(f"{name}, this checkpoint's student, does not know {', '.join(missing)}")
        if student.config.few_steps is None:
            student.register_to_config(few_steps=student.config.default_steps)
        if any(isinstance(module, ChannelsLastGroupNorm) for module in self.unet.modules()):
            lay_out(student.unet, device.type)
        return student

    def _is_still(self, unet: torch.nn.Module) -> bool:
        """Whether this is the network, without adapters."""
        return self.unet is unet and not getattr(unet, "peft_config", None)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As diffusers' own; with the LICENSE of what was loaded, if there is none yet. A network that was changed
        since it was loaded has no student any more."""
        folder, student = Path(save_directory), self.config.student
        if self._licence and not folder.is_file() and not (folder / "LICENSE").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "LICENSE").write_text(self._licence, encoding="utf-8")
        if not self._is_still(self._taught):
            self.register_to_config(student=None)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.register_to_config(student=student)
        even_modes(folder)

    def optimize(self, compile: bool = False, int8: bool = False) -> Optimized:
        """Changes the network to what computes fastest on this machine, by measuring: `print` what comes back.

        Of one picture and of a large photograph's tiles; faster on the whole, at most a tenth slower for either, and
        pictures stay alike (PSNR above 40 dB against float32). `compile` also tries
        `torch.compile` (minutes), `int8` also 8-bit linear layers (needs torchao).
        """
        return optimize(self, compile, int8)

    @property
    def num_timesteps(self) -> int:
        """Steps of the pass that is under way, for callbacks; a hole is filled in several passes, coarse to fine."""
        return self._num_timesteps

    def _task(self, task: str | Task | None) -> Task:
        if isinstance(task, Task):
            return task
        known = self.config.tasks
        name = task or self.config.default_task
        if name not in known:
            raise ValueError(f"task is {name!r}, this checkpoint knows {', '.join(known)}")
        return get_task(name)

    def _predict(self, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network computes in its own dtype; in and out is float32."""
        return evaluate(self.unet, sample, gamma, condition)

    def _is_far(self, first: int, start: float) -> bool:
        """Whether a timestep is so far from `start` that more would be left out than a task meant to."""
        level = torch.logit(noise_level(self.scheduler, self.scheduler.timesteps[first]).cpu().double())
        return float(level) - start > FAR

    def _first_step(self, start: float) -> int:
        """The index of the first timestep at a log-SNR of at least `start`; their number where there is none."""
        gammas = torch.stack([noise_level(self.scheduler, t) for t in self.scheduler.timesteps]).cpu().double()
        late = torch.nonzero(torch.logit(gammas) >= start - 1e-4).flatten().tolist()
        order = self.scheduler.order  # a solver of second order takes its steps in pairs
        return min(math.ceil(late[0] / order) * order, len(gammas)) if late else len(gammas)

    def _calm(self, noise: torch.Tensor, task: Task | None) -> torch.Tensor:
        """The noise that sampling starts from, its slow waves as the scheduler's `slow_noise` says; a tile is too small
        a part of a photograph to have such."""
        kept = self.scheduler.config.get("slow_noise", 1)
        if kept == 1 or (task is not None and task.strategy == "tiles"):
            return noise
        if task is None or task.strategy != "chroma":
            return calm(noise, kept, 2)
        color = chroma(noise)
        return noise - color + calm(color, kept, 1)

    @torch.no_grad()
    def denoise(
        self,
        given: Given,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: torch.Tensor | None = None,
        predict: sizes.Predict | None = None,
        callback: Callable[[int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        estimate: torch.Tensor | None = None,
        start: float = 0.0,
        task: Task | None = None,
        strength: float | None = None,
        shrunk: Sequence[bool] = (),
        eta: float | None = None,
        new_noise: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The sampling loop at the working size, without composing: (B, 3, H, W) in float32.

        With a `task`, what is known (pixels, luma, gray) is put into the predicted picture at every step, so that
        the sample grows together with it (Wang et al. 2022, "DDNM").

        With an `estimate` of the picture, sampling starts from it, noised to the log-SNR `start`: only the
        steps from there on are taken, or the last one where it is noisier by at most 1.5. An `estimate` that no step is
        left for comes back as it is. Else `strength` is the share of the steps that are taken, the last ones, from the
        source (its hole filled smoothly) instead of noise; None is the task's own start, 1 is noise. `shrunk` says of
        each sample whether it is of a larger photograph, whose chroma is evened out for longer (`chroma_guidance`), and
        whose borders start with `border_noise`. `eta` is how much of the noise each step makes anew, from 0 to 1, where
        the scheduler can (ours, DDIM); None is its own, ours `source_eta` for a task that has a start. `new_noise` is
        a step's, for a scheduler that takes some (`variance_noise`), instead of the generator's.

        Raises:
            ValueError: fewer than one step, a strength outside (0, 1], an eta outside [0, 1] or that the scheduler does
                not take, a solver whose pictures would be wrong (`scheduler.UNFIT`).
            FloatingPointError: the sample is not finite; the step is named.
        """
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        if int(steps) != steps or steps < 1:
            raise ValueError(f"num_inference_steps is {steps}, expected a whole number of at least 1")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}, expected above 0 and at most 1")
        check_solver(self.scheduler)
        takes = inspect.signature(self.scheduler.step).parameters
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected 0 (no new noise) to 1 (ancestral)")
        if eta is not None and "eta" not in takes:
            raise ValueError(f"eta is {eta}, but {type(self.scheduler).__name__} takes none")
        predict = predict or self._predict
        given = given.to(self._execution_device)
        estimate = None if estimate is None else estimate.to(self._execution_device)
        settings = self.scheduler.config
        own_levels = "task" in inspect.signature(self.scheduler.set_timesteps).parameters
        levels = {"task": task.name} if own_levels and task is not None else {}
        self.scheduler.set_timesteps(int(steps), device=self._execution_device, **levels)
        condition = network_condition(given, bool(self.unet.config.hole_skip), estimate)
        if latents is None:
            latents = randn_tensor(
                given.condition.shape, generator=generator, device=condition.device, dtype=torch.float32
            )
        elif latents.shape != given.condition.shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected {tuple(given.condition.shape)}")
        timesteps, sample = self.scheduler.timesteps, latents.to(condition.device, torch.float32)
        first = 0
        # small photographs are crisper than large ones: at the network's own size, a source gets all of the noise
        enlarged = estimate is not None or max(condition.shape[-2:]) > self.unet.config.sample_size
        if estimate is not None:
            first = self._first_step(start)
            if first == len(timesteps) and self.scheduler.order == 1 and self._first_step(start - SOONER) < first:
                first -= 1  # of few steps the last
            if first == len(timesteps):
                return estimate
        elif strength is not None:
            order = self.scheduler.order
            first = len(timesteps) - math.ceil(strength * len(timesteps))
            first = first // order * order
            estimate = _source(given) if first else None
        elif task is not None and task.start is not None:
            first = self._first_step(task.start)
            if first < len(timesteps) and not self._is_far(first, task.start):
                estimate = _source(given)
            else:  # too few steps for a start from the source are taken from noise
                first = 0
        evened = settings.get("chroma_guidance") if task is not None and task.strategy == "chroma" else 0
        exploding, sigma = variance_exploding(self.scheduler), self.scheduler.init_noise_sigma
        own = (settings.get("task_noise") or {}).get(task.name) if task is not None else None
        border = settings.get("border_noise") if any(shrunk) and task and task.name == "uncropping" else None
        if estimate is None and border is not None:
            own = border
        if own is not None:
            sigma = own * sigma if exploding else own
        if estimate is None:
            sample = self._calm(sample, task) * sigma
        else:
            gamma = noise_level(self.scheduler, timesteps[first])
            timesteps = timesteps[first:]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(first)
            calm = settings.get("restart_noise") if enlarged else None
            noise = sample if exploding else sample * (sigma if calm is None else calm)
            sample = diffuse(estimate, noise, gamma)
            sample = sample / gamma.sqrt() if exploding else sample
        extra: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
        ours = hasattr(self.scheduler, "gamma") and settings.get("sampling_variance") == "zero"
        if eta is None and ours and settings.get("source_eta") and task is not None and task.start is not None:
            eta = settings.source_eta * task.renewal
        if eta is not None:
            extra["eta"] = eta
        if "variance_noise" not in takes or not (eta or _draws_noise(self.scheduler)):
            new_noise = None
        if new_noise is not None:
            extra.pop("generator", None)
        kind = self.scheduler.config.prediction_type
        smaller = torch.tensor([*shrunk] or [False], device=sample.device).reshape(-1, 1, 1, 1)
        until = torch.where(smaller, SHRUNK_EVENED, EVENED)
        contrast = None
        if evened and settings.get("chroma_contrast", 1) != 1:
            compounded = max(1, self._first_step(math.log(EVENED / (1 - EVENED))) - first)
            stronger = 1 + torch.where(smaller, SHRUNK_CONTRAST, 1.0) * (settings.chroma_contrast - 1)
            contrast = stronger ** (compounded / CONTRASTED) ** -0.3
        self._num_timesteps = len(timesteps)
        if task is not None:
            task = task.in_steps(len(timesteps))
        for i, t in enumerate(self.progress_bar(timesteps)):
            scaled = self.scheduler.scale_model_input(sample, t)
            gamma = noise_level(self.scheduler, t)
            output = predict(scaled, gamma, condition)
            finite = torch.isfinite(output).all()  # a clamp would hide what overflows
            # Euler and Heun carry y / sqrt(gamma): what the network saw is not what they step from
            original = predicted_original(output, scaled, gamma, kind).clamp(-1, 1)
            if evened and gamma <= until.max():
                raised = contrast if gamma <= EVENED else None
                own = None if task is None else task.own
                even = even_chroma(original, luma(given.known), evened, raised, own)
                original = torch.where(gamma <= until, even, original)
            if task is not None:
                del output  # of a large photograph, each of these counts
                original = task.guide(original, given)
                output = output_for(original, scaled, gamma, kind)
            if callback is None:
                del original
            if new_noise is not None:
                extra["variance_noise"] = new_noise(i).to(sample)
            sample = self.scheduler.step(output, t, sample, return_dict=True, **extra).prev_sample
            if callback is not None:
                sample = callback(i, t, {"sample": sample, "pred_original_sample": original}).get("sample", sample)
            if not finite & torch.isfinite(sample).all():
                raise FloatingPointError(f"the sample is not finite after step {i + 1} of {steps} ({self.unet.dtype})")
        return sample

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        task: str | Task | Sequence[str | Task] | None = None,
        mask_image: ImageInput | Sequence[ImageInput | None] | None = None,
        left: int | float = 0,
        right: int | float = 0,
        top: int | float = 0,
        bottom: int | float = 0,
        aspect: float | None = None,
        consistent: bool | None = None,
        texture: bool | None = None,
        hints: ImageInput | Sequence[ImageInput] | None = None,
        num_images_per_input: int = 1,
        num_inference_steps: int | None = None,
        strength: float | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = tuple(_callback_tensor_inputs),
        max_pixels: int = canvas.MAX_PIXELS,
        trim: bool = False,
    ) -> PalettePipelineOutput | tuple:
        """Mends photographs of any size; pixels that were given come back bit for bit.

        Args:
            image: PIL image, path, URL, array, tensor, or a list of them.
            task: a name (`pipe.config.tasks`) or a `Task`, or a list of one for each image; None is the checkpoint's
                default.
            mask_image: for inpainting: the same size as the image, white = generate; or where the hole is, in words:
                "alpha", "#RRGGBB" or "LEFT,TOP,RIGHT,BOTTOM" (`canvas.mask_for`). In a list, None for the images of
                tasks that take none.
            left, right, top, bottom: for uncropping: an int is pixels, a float a fraction of the side.
            aspect: for uncropping, instead of sides: the width / height that is reached by extending both evenly.
            trim: for uncropping: lines along extended sides, as scans have them, are made anew (`canvas.line_at`);
                else they stay, like every pixel that is given, and are told.
            consistent: for JPEG restoration: whether the result is one that JPEG would store as the file's very
                coefficients, which also takes bands out of skies (`coefficients.Coefficients`); those of an earlier,
                coarser JPEG, where the picture shows that it was made of one. None does so where there are any, True
                refuses a picture that has none.
            texture: for inpainting and uncropping: whether a hole in a photograph above the model's size, which comes
                out soft, gets the texture of its surroundings, where these have one (`texture.add_texture`). None is
                the task's own, True.
            hints: for colorization: coloured strokes on a transparent picture of the same size; theirs is the chroma
                there, and around them up to the photograph's edges. For several images, one each (None for none).
            num_images_per_input: variations of each picture.
            num_inference_steps: network evaluations, the checkpoint's default if None.
            strength: share of them that is taken, starting from the source instead of noise (`denoise`).
            eta: how much of the noise each step makes anew: 0 keeps close to what is given, 1 adds the most detail,
                which need not be the true one. None is the scheduler's own: of the starter 0.5 for JPEG restoration,
                less for files above quality 10, 0 above 30, and 0 in other tasks. Source: Song et al. 2021 (DDIM).
            generator: one for all, or one for each input.
            latents: the start of sampling, at the working size (num_images_per_input, 3, h, w); of one image.
            output_type: "pil" (8 bits; 16 where a gray picture of 16 bits stays gray), "np" ((H, W, 3) in [0, 1]) or
                "pt" ((3, H, W) in [-1, 1]).
            callback_on_step_end: called as f(pipe, step, timestep, tensors) => tensors.
            max_pixels: larger files are refused before they are decoded.

        Raises:
            ValueError, TypeError: the message names what came and what was expected. FloatingPointError: a sample is
                not finite; the step is named. MemoryError: not even one sample fits; the message says what helps.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, expected 'pil', 'np' or 'pt'")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            asked, known = list(callback_on_step_end_tensor_inputs), self._callback_tensor_inputs
            raise ValueError(f"callback_on_step_end_tensor_inputs is {asked}, expected names of {known}")
        if num_images_per_input < 1:
            raise ValueError(f"num_images_per_input is {num_images_per_input}, expected at least 1")
        pictures = canvas.read_list(image, max_pixels)
        tasks = [self._task(one) for one in self._one_each(task, "tasks", len(pictures), shared=True)]
        masks = self._one_each(mask_image, "masks", len(pictures), shared=mask_image is None)
        if consistent and not any(one.name == "jpeg_restoration" for one in tasks):
            raise ValueError(f"consistent belongs to 'jpeg_restoration', the task is {tasks[0].name!r}")
        if texture is not None and not any(one.strategy == "hole" for one in tasks):
            raise ValueError(f"texture belongs to tasks that fill a hole, the task is {tasks[0].name!r}")
        sides = dict(left=left, right=right, top=top, bottom=bottom)
        grown = aspect is not None or any(sides.values())
        if grown and not any(one.name == "uncropping" for one in tasks):
            raise ValueError(
                f"left, right, top, bottom and aspect belong to 'uncropping', the task is {tasks[0].name!r}"
            )
        if trim and not any(one.name == "uncropping" for one in tasks):
            raise ValueError(f"trim belongs to 'uncropping', the task is {tasks[0].name!r}")
        met = [_meet(*one, max_pixels, aspect, sides, trim) for one in zip(pictures, masks, tasks, strict=True)]
        pictures, masks = [picture for picture, _ in met], [mask for _, mask in met]
        strokes = _strokes(hints, pictures, tasks)
        if latents is not None and len(pictures) > 1:
            raise ValueError(f"latents came for {len(pictures)} images, expected one image")
        if isinstance(generator, (list, tuple)) and len(generator) != len(pictures):
            raise ValueError(f"{len(generator)} generators came for {len(pictures)} images, expected one for each")

        def callback(step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            return callback_on_step_end(self, step, timestep, wanted) or {}  # type: ignore[misc]

        generators = []
        for i in range(len(pictures)):
            source = generator[i] if isinstance(generator, (list, tuple)) else generator
            seed = int(torch.randint(0, 2**62, (), generator=source, device=source.device if source else "cpu"))
            generators.append([torch.Generator().manual_seed(seed + k) for k in range(num_images_per_input)])
        finished: dict[int, list[Any]] = {i: [] for i in range(len(pictures))}
        for group in self._groups(pictures, tasks, num_images_per_input):
            chosen = tasks[group[0]]
            if type(chosen) is JPEGRestoration:
                chosen = _consistent(chosen, pictures[group[0]], consistent)
            if texture is not None:
                chosen = copy.copy(chosen)
                chosen.texture = texture
            together = [generators[i] for i in group]
            pixels = num_images_per_input * sum(math.prod(pictures[i].size) for i in group)
            if latents is None and num_images_per_input > 1 and pixels > AT_ONCE:  # one variation at a time
                rounds = [[[own] for own in column] for column in zip(*together, strict=True)]
                for i in group:
                    masks[i] = None if masks[i] is None else masks[i].bool()  # a quarter of the memory
            else:
                rounds = [together]
            photographs = [pictures[i].image for i in group]
            if chosen.strategy == "hole" and chosen.name != "uncropping":  # filled in place: `_grow`'s canvas is ours
                photographs = [x.clone() for x in photographs]
            for some in rounds:  # what lies in a hole is not looked at, so that the next round may find the last one's
                holes = [masks[i] for i in group]
                images = self._restore(
                    photographs, [None if hole is None else hole.float() for hole in holes], chosen, some,
                    num_inference_steps, latents, callback if callback_on_step_end else None, strength, eta,
                    [strokes[i] for i in group],
                )  # fmt: skip
                for i in reversed(group):  # each is given up as soon as it is finished
                    finished[i] += [_finished(x, pictures[i], output_type) for x in images.pop().split(1)]
            del photographs

        out: Any = [x for i in range(len(pictures)) for x in finished[i]]
        if output_type != "pil" and len({x.shape for x in out}) == 1:
            out = np.stack(out) if output_type == "np" else torch.stack(out)
        return PalettePipelineOutput(images=out) if return_dict else (out,)

    def _groups(self, pictures: list[Picture], tasks: list[Task], number: int) -> list[list[int]]:
        """Which pictures are sampled as one batch: those of one task that the model sees whole, at one size."""
        same: dict[Any, list[int]] = {}
        for i, (picture, task) in enumerate(zip(pictures, tasks, strict=True)):
            view = sizes.fit(*picture.size, self.unet.config.sample_size, self.unet.size_multiple)
            same.setdefault(i if task.strategy in ("hole", "tiles") else (task, view.outer), []).append(i)
        most = max(1, BATCH // number)
        return [group[k : k + most] for group in same.values() for k in range(0, len(group), most)]

    @staticmethod
    def _one_each(value: Any, name: str, number: int, shared: bool) -> list:
        """The value of each of so many images; one that is `shared` holds for all."""
        batch = isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 4 and len(value) > 1
        several = batch or isinstance(value, (list, tuple))
        values = list(value) if several else [value] * (number if shared else 1)
        if len(values) != number:
            raise ValueError(f"{len(values)} {name} came for {number} images, expected one for each")
        return values

    def _restore(
        self,
        images: list[torch.Tensor],
        masks: list[torch.Tensor | None],
        task: Task,
        generators: list[list[torch.Generator]],
        steps: int | None,
        latents: torch.Tensor | None,
        callback: Callable | None,
        strength: float | None,
        eta: float | None,
        strokes: list[Hints | None],
    ) -> list[torch.Tensor]:
        """Photographs (1, 3, H, W), several only where they are sampled whole and at one size => the variations of
        each, (N, 3, H, W)."""
        every = [one for each in generators for one in each]
        native, multiple, number = self.unet.config.sample_size, self.unet.size_multiple, len(generators[0])
        views = [sizes.fit(image.shape[-2], image.shape[-1], native, multiple) for image in images]
        spreads = [
            None if h is None else h.spread(image, max(v.inner))
            for h, image, v in zip(strokes, images, views, strict=True)
        ]
        told = Colorization(Spread.of_batch(spreads, views, number)) if any(spreads) else task
        denoise = partial(
            self.denoise, generator=every, num_inference_steps=steps, callback=callback, task=told, strength=strength,
            eta=eta,
        )  # fmt: skip
        if task.strategy == "hole":
            return [self._fill_all(images[0], masks[0], task, every, latents, denoise)]
        if task.strategy == "tiles":
            top, left = (0, 0) if latents is not None else task.before  # so that the tiles have a JPEG's grid
            image = F.pad(images[0], (left, 0, top, 0), mode="replicate") if top or left else images[0]
            return [task.finish(self._mend(image, task, every, latents, denoise)[..., top:, left:])]
        seen = [v.look(image).expand(number, -1, -1, -1) for v, image in zip(views, images, strict=True)]
        given = task.prepare(torch.cat(seen), None, every)
        shrunk = [v.inner[0] < v.height for v in views for _ in range(number)]
        sample = denoise(given, latents=latents, shrunk=shrunk).cpu().clamp(-1, 1)
        if task.strategy == "chroma":
            colors = chroma(task.compose(sample, given)).split(number)
            merged = [
                sizes.merge_chroma(image, c, v) if spread is None else spread.merged(image, c, v)
                for image, c, v, spread in zip(images, colors, views, spreads, strict=True)
            ]
            return [m if h is None else h.imposed(m) for m, h in zip(merged, strokes, strict=True)]
        results = []  # the task composes at the photograph's own resolution
        for image, part, v in zip(images, sample.split(number), views, strict=True):
            known = image.expand(number, -1, -1, -1)
            results.append(task.finish(task.compose(v.back(part), Given(known=known, condition=known))))
        return results

    def _mend(
        self,
        image: torch.Tensor,
        task: Task,
        generators: list[torch.Generator],
        latents: torch.Tensor | None,
        denoise: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """One photograph (1, 3, H, W) at its own resolution, in tiles => its variations (N, 3, H, W)."""
        number = len(generators)
        predict = sizes.tiled(self._predict, max(128, self.unet.config.sample_size), 16)
        blocks = sizes.blocks(image.shape[-2], image.shape[-1], max(16, self.unet.size_multiple))
        if len(blocks) > 1 and latents is not None:
            raise ValueError(f"latents came, but the photograph is sampled in {len(blocks)} blocks, each on its own")
        seeds = _seeds(generators) if len(blocks) > 1 else []
        result = torch.zeros(number, *image.shape[1:])
        for block in blocks:
            given = task.prepare(block.look(image).expand(number, -1, -1, -1), None, generators)
            noise = sizes.noise_at(seeds, block.top, block.left, block.outer) if seeds else latents
            anew = partial(sizes.noise_of_step, seeds, block) if seeds else None
            sample = denoise(given, latents=noise, predict=predict, new_noise=anew).cpu().clamp(-1, 1)
            known = block.crop(image).expand(number, -1, -1, -1)
            sizes.lay(result, task.compose(block.back(sample), Given(known=known, condition=known)), block)
        return result

    def _fill_all(
        self,
        image: torch.Tensor,
        mask: torch.Tensor | None,
        task: Task,
        generators: list[torch.Generator],
        latents: torch.Tensor | None,
        denoise: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """One photograph (1, 3, H, W), hole after hole => its variations (N, 3, H, W). A single one is made in place,
        so that a large photograph is held once."""
        assert mask is not None
        result = image if len(generators) == 1 else image.repeat(len(generators), 1, 1, 1)
        holes: Iterable[torch.Tensor] = sizes.rings(mask) if task.name == "uncropping" else sizes.separate(mask)
        if latents is not None:
            holes = list(holes)
            if len(holes) > 1:
                raise ValueError(f"latents came, but the mask has {len(holes)} holes apart, each sampled on its own")
        for hole in holes:
            self._fill(result, hole, mask, task, generators, latents, denoise)
            if hole is not mask:
                mask -= hole  # in place: `_meet` made it for this call, and it is as large as the photograph
        return result

    def _fill(
        self,
        image: torch.Tensor,
        part: torch.Tensor,
        mask: torch.Tensor,
        task: Task,
        generators: list[torch.Generator],
        latents: torch.Tensor | None,
        denoise: Callable[..., torch.Tensor],
    ) -> None:
        """One hole, `part`, of all that is unknown, `mask`: filled in the photograph (N, 3, H, W), in place, coarse to
        fine: what the model made of the whole is refined at twice the resolution, tile by tile, up to the photograph's
        own."""
        native, multiple = self.unet.config.sample_size, self.unet.size_multiple
        views = sizes.hole_view(part, native, multiple).levels(multiple)
        finest, finest_hole, finest_part = (views[-1].crop(x) for x in (image, mask, part))
        grain = sizes.grain(finest, 1 - finest_hole)
        estimate: Any = None
        for coarse, view in zip([None, *views], views, strict=False):
            if finest.shape[-2:].numel() > AT_ONCE:
                give_memory_back()
            level, hole, wanted = finest, finest_hole, finest_part
            if view is not views[-1]:
                level, hole = (x[..., : view.inner[0], : view.inner[1]] for x in view.look_known(image, mask))
                wanted = hole
            if hole.any():  # else too thin to be seen at this scale
                # a photograph below the model's size has been seen in all its detail
                seen = coarse is not None and view.inner <= coarse.inner and estimate is not None
                shrunk = view.inner[0] < view.height
                sample = None if seen else partial(denoise, shrunk=[shrunk])
                if task.name == "uncropping" and shrunk and coarse is None and latents is None:
                    hole = wanted = self._extend_in_strips(level, hole, view.crop(part), task, generators, sample)
                if hole.any():
                    self._fill_level(level, hole, wanted, estimate, task, generators, latents, sample)
                latents = None
            estimate = level
        if min(views[-1].inner) > native:  # what was brought up is as smooth as the model's own size
            missing = (grain.square() - sizes.grain(finest, finest_part).square()).clamp_min(0)
            self._add_grain(finest, finest_part, missing, generators)
            seeds = _seeds(generators)  # drawn in any case, so that later holes are the same without texture
            if task.texture:
                patch = patch_size(min(views[-1].inner), native)
                at = lambda top, left, size: sizes.noise_at(seeds, top + patch, left + patch, size, 1)  # noqa: E731
                add_texture(finest, finest_part, finest_hole, patch, at)

    def _extend_in_strips(
        self,
        level: torch.Tensor,
        hole: torch.Tensor,
        part: torch.Tensor,
        task: Task,
        generators: list[torch.Generator],
        denoise: Callable[..., torch.Tensor] | None,
    ) -> torch.Tensor:
        """Extends a picture (N, 3, h, w) of the model's size beyond its border, in place, strip after strip, as far as
        `part`, in the photograph's pixels, reaches => what is left of the hole (1, 1, h, w)."""
        wanted = F.adaptive_max_pool2d(part, hole.shape[-2:])
        left = hole.clone()
        if hole.all():  # nothing to begin at
            return left
        for strip, within in sizes.strips(hole, max(1, round(self.unet.config.sample_size * STRIP))):
            if not (wanted * left).any():
                break
            some, own = level[within], strip[within]
            self._fill_level(some, own, own, None, task, generators, None, denoise)
            left -= strip
        return left

    def _fill_level(
        self,
        level: torch.Tensor,
        hole: torch.Tensor,
        wanted: torch.Tensor,
        estimate: torch.Tensor | None,
        task: Task,
        generators: list[torch.Generator],
        latents: torch.Tensor | None,
        denoise: Callable[..., torch.Tensor] | None,
    ) -> None:
        """Fills the hole (1, 1, h, w) of a picture (N, 3, h, w) at one scale in place, as far as it is `wanted`, from
        the `estimate` of the scale before: block by block where it is large. Without `denoise`, by the estimate."""
        native, multiple = self.unet.config.sample_size, self.unet.size_multiple
        size = level.shape[-2], level.shape[-1]
        blocks = [sizes.full(*size, multiple)] if estimate is None else sizes.blocks(*size, multiple)
        seeds = _seeds(generators) if len(blocks) > 1 else []
        for block in blocks:
            mask = sizes.pad_to(block.crop(hole), block.outer)
            if not mask.any():
                continue
            known = sizes.pad_to(block.crop(level), block.outer)
            given = task.prepare(known, mask.expand(len(level), -1, -1, -1), generators)
            begin, predict, noise, anew = None, None, latents, None
            if estimate is not None:
                up = sizes.pad_to(sizes.enlarged(estimate, size, block), block.outer).clamp(-1, 1)
                begin = torch.where(mask > 0, up, given.known)
                overlap = max(16, native // 64 * 16)
                tile = sizes.cheapest_tile(mask, native, multiple, overlap)
                predict = sizes.tiled(self._predict, tile, overlap, where=mask)
            if seeds and begin is not None:
                noise, inside = sizes.noise_at(seeds, block.top, block.left, block.outer, channels=6).split(3, dim=1)
                # what is known within one block doesn't say whether the photograph is gray: the estimate does
                anew = partial(sizes.noise_of_step, seeds, block)
                given = replace(given, known=begin, condition=torch.where(mask > 0, inside, given.condition))
            sample = begin
            if denoise is not None:
                sample = denoise(
                    given, latents=noise, predict=predict, estimate=begin, start=REFINE_FROM, new_noise=anew
                ).cpu()
            assert sample is not None
            filled = task.compose(sample.clamp(-1, 1), given)[..., : block.height, : block.width]
            if predict is not None and denoise is not None and self.unet.config.patch_size == 2:
                filled = sizes.without_grid(filled, block.crop(hole)).clamp(-1, 1)
            sizes.lay(level, torch.where(block.crop(wanted) > 0, filled, block.crop(level)), block)

    def _add_grain(
        self, image: torch.Tensor, hole: torch.Tensor, variance: torch.Tensor, generators: list[torch.Generator]
    ) -> None:
        """To the hole (1, 1, H, W) of a photograph (N, 3, H, W), in place, in bands where it is large."""
        height, width = image.shape[-2:]
        whole = len(sizes.blocks(height, width, 1)) == 1
        seeds, rows = ([], height) if whole else (_seeds(generators), 512)
        for top in range(0, height, rows):
            here, where = (x[..., top : top + rows, :] for x in (image, hole))
            size = here.shape[-2], width
            noise = (
                randn_tensor((len(image), 1, *size), generator=generators)
                if whole
                else sizes.noise_at(seeds, top, 0, size, channels=1)
            )
            here[:] = torch.where(where > 0, (here + noise * variance.sqrt()).clamp(-1, 1), here)


def _seeds(generators: list[torch.Generator]) -> list[int]:
    """One drawn from each, for noise that depends on position."""
    return [int(torch.randint(0, 2**62, (), generator=generator)) for generator in generators]


def _draws_noise(scheduler: Any) -> bool:
    """Whether its steps bring noise by their settings alone."""
    if hasattr(scheduler, "gamma"):
        return scheduler.config.get("sampling_variance") != "zero"
    return str(scheduler.config.get("algorithm_type", "")).startswith("sde")


def _source(given: Given) -> torch.Tensor:
    """What sampling may start from: what the network sees, a hole filled smoothly."""
    if given.mask is None:
        return given.condition
    return torch.where(given.mask > 0, extend(given.known, 1 - given.mask), given.known)


def _without_hidden(picture: Picture, hole: torch.Tensor | None) -> Picture:
    """What nobody sees of a picture, under full transparency, is set aside, and continues what is around it, smoothly:
    it would decide on the colours of all, and on what lies beyond a border. What is to be filled is not kept."""
    if picture.alpha is None:
        return picture
    clear = picture.alpha[0, 0] == 0
    if not clear.any() or clear.all():
        return picture
    (height, width), most = picture.size, max(picture.size)
    small = tuple(max(1, round(side * min(1, HIDDEN / most))) for side in (height, width))
    seen = (~clear)[None, None].float()
    share = F.adaptive_avg_pool2d(seen, small)
    parts = [F.adaptive_avg_pool2d(one * seen, small) for one in picture.image.split(1, dim=1)]
    around = extend(torch.cat(parts, 1) / share.clamp_min(1e-6), (share > 0).float())
    del parts, seen
    kept = clear if hole is None else clear & (hole[0, 0] == 0)
    hidden = (kept, picture.image[0, :, kept])
    image = picture.image.clone()
    for top in range(0, height, 512):
        rows = clear[top : top + 512]
        if rows.any():
            band = image[0, :, top : top + 512]
            block = replace(sizes.full(height, width, 1), top=top, height=len(rows))
            up = sizes.enlarged(around, (height, width), block)
            band[:, rows] = up[0, :, rows].clamp(-1, 1)
    return replace(picture, image=image, hidden=hidden)


def _without_lines(picture: Picture, lines: Mapping[str, int]) -> Picture:
    """Lines along sides that are extended, so many pixels wide, are told and set aside, and what lies behind them takes
    their place: they would go on as dark bars."""
    lines = {side: depth for side, depth in lines.items() if depth}
    if not lines:
        return picture
    told = ", ".join(f"{depth} pixel{'s' * (depth > 1)} wide at the {side}" for side, depth in lines.items())
    name = picture.file or "the picture"
    warnings.warn(f"{name} has a line along its edge, {told}: trim makes it anew", LossWarning, stacklevel=2)
    left, right, top, bottom = (lines.get(side, 0) for side in ("left", "right", "top", "bottom"))
    height, width = picture.size
    behind = picture.image[..., top : height - bottom, left : width - right]
    where = border_mask(height, width, left, right, top, bottom)[0] > 0
    if picture.hidden is not None:
        where |= picture.hidden[0]
    image = F.pad(behind, (left, right, top, bottom), mode="replicate")
    return replace(picture, image=image, hidden=(where, _as_given(picture.image, picture)[0, :, where]))


def _as_given(image: torch.Tensor, picture: Picture) -> torch.Tensor:
    """(1, 3, H, W) with what was set aside of the picture."""
    if picture.hidden is None:
        return image
    where, values = picture.hidden
    image = image.clone()
    image[0, :, where] = values
    return image


def _meet(
    picture: Picture,
    mask: ImageInput | None,
    task: Task,
    max_pixels: int,
    aspect: float | None,
    sides: Mapping[str, int | float],
    trim: bool,
) -> tuple[Picture, torch.Tensor | None]:
    """What a task works on: the picture, on a larger canvas for uncropping, and its hole."""
    if task.name == "uncropping":
        if mask is not None:
            raise ValueError("task 'uncropping' takes left, right, top and bottom, no mask_image")
        if aspect is not None:
            if any(sides.values()):
                raise ValueError("uncropping takes either an aspect or left, right, top and bottom")
            sides = sizes.sides_for(picture.size, aspect)
        picture, pixels = _without_hidden(picture, None), _border(picture.size, max_pixels, **sides)
        lines = {side: canvas.line_at(picture.image, side) for side, number in pixels.items() if number}
        return _grow(picture if trim else _without_lines(picture, lines), pixels, lines if trim else {})
    if not task.takes_mask:
        if mask is not None:
            raise ValueError(f"task {task.name!r} takes no mask_image")
        return _without_hidden(picture, None), None
    if mask is None:
        raise ValueError(f"task {task.name!r} needs a mask_image: white = generate, black = keep")
    picture, hole = canvas.with_mask(picture, mask)  # which may be told by what lies under transparency
    return _without_hidden(picture, hole), hole


def _finished(image: torch.Tensor, picture: Picture, output_type: str) -> Any:
    """(1, 3, H, W) => what was asked for; what nobody sees is what it was."""
    image = _as_given(image, picture)
    if output_type == "pil":
        return canvas.to_pil(image, picture)
    return ((image[0] + 1) / 2).permute(1, 2, 0).numpy() if output_type == "np" else image[0].clone()


def _consistent(task: JPEGRestoration, picture: Picture, wanted: bool | None) -> JPEGRestoration:
    """JPEG restoration as a picture asks for it; held to the coefficients of its JPEG, where there are any and they are
    wanted (None: where there are any)."""
    found = task.coefficients or find_coefficients(picture)
    if wanted and found is None:
        raise ValueError("consistent needs a JPEG file, or a picture that shows the blocks of one: this one does not")
    chosen = copy.copy(task) if wanted is False else JPEGRestoration(found)
    chosen.before = task.before if found is None else found.before
    chosen.renewal = _renewal(picture.quality if found is None or found.earlier is None else found.earlier)
    return chosen


def _renewal(quality: int | None) -> float:
    """How much of the starter's new noise a JPEG of this quality (1 to 100) gets: little was lost in a mild one."""
    return 1.0 if quality is None else min(1.0, max(0.0, (30 - quality) / 20))


def _strokes(hints: Any, pictures: list[Picture], tasks: list[Task]) -> list[Hints | None]:
    """The hints of each picture."""
    if hints is None:
        return [None] * len(pictures)
    each = list(hints) if isinstance(hints, (list, tuple)) else [hints]
    if len(each) != len(pictures):
        raise ValueError(f"{len(each)} hints came for {len(pictures)} images, expected one for each (or None)")
    for one, task in zip(each, tasks, strict=True):
        if one is not None and type(task) is not Colorization:
            raise ValueError(f"hints belong to 'colorization', the task is {task.name!r}")
    return [None if h is None else read_hints(h, picture) for h, picture in zip(each, pictures, strict=True)]


def _border(
    size: tuple[int, int], max_pixels: int, left: float, right: float, top: float, bottom: float
) -> dict[str, int]:
    """Pixels by which each side of a picture of (height, width) is extended.

    Raises:
        ValueError: none at all, a negative number, a fraction above `MAX_FRACTION`, or too large a picture.
    """
    height, width = size
    pixels = {}
    for name, value, side in (
        ("left", left, width), ("right", right, width), ("top", top, height), ("bottom", bottom, height),
    ):  # fmt: skip
        if not np.isfinite(float(value) * side) or value < 0:
            raise ValueError(f"{name} is {value}, expected pixels (int) or a fraction of the side (float), at least 0")
        if not isinstance(value, numbers.Integral) and value > MAX_FRACTION:
            message = f"{name} is {value:g}, a fraction of the side: {value:.0%} of it; pixels are whole numbers"
            raise ValueError(f"{message}, and fractions at most {MAX_FRACTION}")
        pixels[name] = int(value) if isinstance(value, numbers.Integral) else round(float(value) * side)
    if not any(pixels.values()):
        raise ValueError("left, right, top and bottom are all zero, expected at least one side to extend")
    new = (height + pixels["top"] + pixels["bottom"], width + pixels["left"] + pixels["right"])
    if new[0] * new[1] > max_pixels:
        raise ValueError(f"the extended picture is {new[1]}x{new[0]}, the limit is {max_pixels} pixels (max_pixels)")
    return pixels


def _grow(picture: Picture, pixels: Mapping[str, int], lines: Mapping[str, int]) -> tuple[Picture, torch.Tensor]:
    """The picture on a larger canvas, and the border as a mask, with lines of so many pixels that are made anew."""
    height, width = picture.size
    new = (height + pixels["top"] + pixels["bottom"], width + pixels["left"] + pixels["right"])
    inside = (..., slice(pixels["top"], pixels["top"] + height), slice(pixels["left"], pixels["left"] + width))
    image = torch.zeros(1, 3, *new)
    image[inside] = picture.image
    alpha, hidden = picture.alpha, None
    if alpha is not None:  # beside what is transparent, the border is
        alpha = F.pad(alpha, [pixels[name] for name in ("left", "right", "top", "bottom")], mode="replicate")
    if picture.hidden is not None:
        where = torch.zeros(new, dtype=torch.bool)
        where[inside[1:]] = picture.hidden[0]
        hidden = (where, picture.hidden[1])  # row by row, as before
    grown = Picture(image, alpha, picture.info, deep=picture.deep, hidden=hidden)
    return grown, border_mask(*new, **{side: number + lines.get(side, 0) for side, number in pixels.items()})[None]
