"""The tasks: how a source image is made, and how a sample becomes the picture that is returned.

Images are (B, 3, H, W), RGB, [-1, 1]; masks (B, 1, H, W), 1 = generate, 0 = keep.
"""

import copy
import io
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .coefficients import Coefficients
from .color import chroma, is_gray, luma, with_luma
from .hints import Spread
from .masks import extend, free_form_mask, numpy_generator, rectangle_mask, seamless, uncropping_mask

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Given:
    """What the model is given, always at its working size.

    known: what must be kept, (B, 3, H, W). condition: what the U-Net sees; unknown pixels are noise.
    mask: (B, 1, H, W), 1 = generate, 0 = keep; None = everywhere.
    """

    known: torch.Tensor
    condition: torch.Tensor
    mask: torch.Tensor | None = None

    @staticmethod
    def cat(several: "list[Given]") -> "Given":
        """Those of one task, as one batch."""
        masks = [given.mask for given in several if given.mask is not None]
        return Given(
            known=torch.cat([given.known for given in several]),
            condition=torch.cat([given.condition for given in several]),
            mask=torch.cat(masks) if masks else None,
        )

    def first(self, number: int) -> "Given":
        """Of a batch, the first so many."""
        mask = None if self.mask is None else self.mask[:number]
        return replace(self, known=self.known[:number], condition=self.condition[:number], mask=mask)

    def to(self, device: torch.device | str) -> "Given":
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Given(self.known.to(device), self.condition.to(device), mask)


def network_condition(given: Given, holes: bool, fill: torch.Tensor | None = None) -> torch.Tensor:
    """What the U-Net sees of the given: `condition` (the paper), or, for a network that is told its holes
    (`hole_skip`), the picture with its holes filled smoothly, and the hole itself: (B, 4, H, W).

    A better `fill` (B, 3, H, W) than the smooth one may be at hand.
    """
    if not holes or given.mask is None:
        return unfilled_condition(given, holes)
    if fill is None:
        return fill_holes(unfilled_condition(given, holes))
    return torch.cat([torch.where(given.mask > 0, fill, given.known), given.mask], dim=1)


def unfilled_condition(given: Given, holes: bool) -> torch.Tensor:
    """As `network_condition`, before `fill_holes`."""
    if not holes:
        return given.condition
    if given.mask is None:
        return torch.cat([given.condition, torch.zeros_like(given.condition[:, :1])], dim=1)
    return torch.cat([given.known, given.mask], dim=1)


def fill_holes(condition: torch.Tensor) -> torch.Tensor:
    """A picture and its hole, (B, 4, H, W): the hole filled smoothly, whatever number it held; a condition without a
    channel for holes, (B, 3, H, W), as it is. A batch takes hardly longer than a sample, and a GPU next to no time."""
    if condition.shape[1] == 3:
        return condition
    picture, hole = condition[:, :3], condition[:, 3:]
    return torch.cat([torch.where(hole > 0, extend(picture, 1 - hole), picture), hole], dim=1)


class Task:
    """A task has three verbs, `guide` for sampling, and `finish`. `degrade` alone is enough to train; override the
    others where the user's input is not itself the condition, or where pixels must be kept. A large photograph is
    prepared and composed block by block where it is sampled at its own resolution.

    name: as users write it. takes_mask: whether a mask is needed. strategy: how photographs of any size
    are met (`sizes.py`). start: the log-SNR at which sampling starts from the source, where that is already
    close to the picture; None starts from noise. keeps_gray: whether gray input stays gray; a task whose gray
    sources have coloured targets says False. texture: whether a hole of a photograph above the model's size gets the
    texture of its surroundings (`texture.py`). renewal: a factor on the scheduler's `source_eta`. before: (rows,
    columns) that are put before a photograph where it is met in tiles, whose places they move. own: how much of a
    pixel's chroma is the model's, (B, 1, h, w) at its working size, None for all; the rest's contrast is left alone.
    """

    name = ""
    takes_mask = False
    strategy = "whole"
    start: float | None = None
    keeps_gray = True
    texture = True
    renewal = 1.0
    before = (0, 0)
    own: torch.Tensor | None = None

    def in_steps(self, number: int) -> "Task":
        """The same task, for each of so many steps of sampling."""
        return self

    def degrade(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> Given:
        """One clean image (1, 3, H, W) => its source, as in training and evaluation."""
        raise NotImplementedError(f"{type(self).__name__} must define degrade(clean, generator)")

    def prepare(self, image: torch.Tensor, mask: torch.Tensor | None = None, generator: Generators = None) -> Given:
        """A user's picture (B, 3, H, W), already degraded => what the model is given."""
        return Given(known=image, condition=image)

    def compose(self, sample: torch.Tensor, given: Given) -> torch.Tensor:
        """The model's sample (B, 3, H, W) => the picture returned; gray input stays gray."""
        if not self.keeps_gray:
            return sample.clamp(-1, 1)
        gray = is_gray(given.known)[:, None, None, None]
        return torch.where(gray, luma(sample), sample).clamp(-1, 1)

    def guide(self, original: torch.Tensor, given: Given) -> torch.Tensor:
        """The picture that is predicted at a step (B, 3, H, W) => the same, with what is known put into it."""
        return self.compose(original, given)

    def finish(self, image: torch.Tensor) -> torch.Tensor:
        """The whole photograph, composed (B, 3, H, W) => the one returned; it may be changed in place."""
        return image


class Colorization(Task):
    """Grayscale => colour. The photograph's own luma is kept, the model gives the chroma; with `hints` at its working
    size, it is blended with theirs, in so many steps (`in_steps`)."""

    name = "colorization"
    strategy = "chroma"

    def __init__(self, hints: Spread | None = None):
        self.hints = hints
        if hints is not None:
            self.own = 1 - hints.share

    def in_steps(self, number: int) -> "Colorization":
        if self.hints is None:
            return self
        step = copy.copy(self)
        step.hints = self.hints.of_step(number)
        return step

    def degrade(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> Given:
        return self.prepare(clean)

    def prepare(self, image: torch.Tensor, mask: torch.Tensor | None = None, generator: Generators = None) -> Given:
        gray = luma(image).expand_as(image).contiguous()
        return Given(known=gray, condition=gray)

    def compose(self, sample: torch.Tensor, given: Given) -> torch.Tensor:
        light, color = luma(given.known), chroma(sample)
        color = color if self.hints is None else self.hints.blend(color)
        return with_luma(light, color).clamp(-1, 1)


class Inpainting(Task):
    """Fills a hole. The hole holds standard Gaussian noise, and there is no mask channel (the paper)."""

    name = "inpainting"
    takes_mask = True
    strategy = "hole"

    def draw_mask(self, height: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """60% free-form, 40% rectangles, as in the paper: (1, H, W)."""
        free_form = torch.rand((), generator=generator).item() < 0.6
        return (free_form_mask if free_form else rectangle_mask)(height, width, generator)

    def degrade(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> Given:
        mask = self.draw_mask(clean.shape[-2], clean.shape[-1], generator)[None].to(clean)
        return self.prepare(clean, mask, generator)

    def prepare(self, image: torch.Tensor, mask: torch.Tensor | None = None, generator: Generators = None) -> Given:
        if mask is None:
            raise ValueError(f"task {self.name!r} needs a mask: 1 (white) = generate, 0 (black) = keep")
        noise = randn_tensor(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        # torch.where and not a product: what lies under the hole may be anything, NaN included
        hole = mask > 0.5
        zero = torch.zeros((), dtype=image.dtype, device=image.device)
        return Given(
            known=torch.where(hole, zero, image), condition=torch.where(hole, noise, image), mask=hole.to(image.dtype)
        )

    def compose(self, sample: torch.Tensor, given: Given) -> torch.Tensor:
        assert given.mask is not None
        return self.guide(seamless(sample.clamp(-1, 1), given.known, given.mask), given)

    def guide(self, original: torch.Tensor, given: Given) -> torch.Tensor:
        assert given.mask is not None
        return torch.where(given.mask > 0.5, Task.compose(self, original, given), given.known)


class Uncropping(Inpainting):
    """Extends a picture beyond its border: inpainting with the border as the hole."""

    name = "uncropping"

    def draw_mask(self, height: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
        return uncropping_mask(height, width, generator)


def jpeg(image: torch.Tensor, quality: int, subsampling: str = "4:2:0") -> torch.Tensor:
    """(1, 3, H, W) => the same after JPEG at `quality` (1 to 95, libjpeg's scale)."""
    pixels = ((image[0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    decoded = np.asarray(Image.open(buffer).convert("RGB"))
    return (torch.from_numpy(decoded.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1).to(image)


class JPEGRestoration(Task):
    """JPEG => the picture before compression. Quality factors as in the paper: 5 to 30, p(Q) ~ exp(-Q / 10).

    With the `coefficients` of its file (`read_coefficients`), the result is moved to a smooth picture close by that the
    file could have been made of.
    """

    name = "jpeg_restoration"
    strategy = "tiles"
    start = -4.0  # nearly all of the noise: from less, coloured blocks of the source stay
    qualities = np.arange(5, 31)

    def __init__(self, coefficients: Coefficients | None = None):
        self.coefficients = coefficients
        if coefficients is not None:
            self.before = coefficients.before

    def degrade(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> Given:
        rng = numpy_generator(generator)
        weights = np.exp(-self.qualities / 10)
        quality = int(rng.choice(self.qualities, p=weights / weights.sum()))
        return self.prepare(jpeg(clean, quality, "4:2:0" if rng.random() < 0.75 else "4:4:4"))

    def finish(self, image: torch.Tensor) -> torch.Tensor:
        return image if self.coefficients is None else self.coefficients.smooth_(image)


class Paired(Task):
    """A translation learnt from pairs: the data set has a column of sources beside the one of targets."""

    name = "paired"
    strategy = "tiles"
    keeps_gray = False

    def degrade(self, clean: torch.Tensor, generator: torch.Generator | None = None) -> Given:
        raise ValueError("task 'paired' makes no source: name the data set's source_column")


_TASKS: dict[str, Task] = {}


def register_task(task: Task | type[Task]) -> Task | type[Task]:
    """Makes a task known by its name, to training and pipeline; also a class decorator. A checkpoint of it needs
    the same registration where it is loaded.

    >>> @register_task
    ... class Negative(Task):
    ...     name = "negative"
    ...     def degrade(self, clean, generator=None):
    ...         return self.prepare(-clean)
    >>> get_task("negative").degrade(torch.ones(1, 3, 8, 8)).condition.max().item()
    -1.0
    """
    instance = task() if isinstance(task, type) else task
    if not isinstance(instance, Task) or not instance.name.isidentifier():
        raise TypeError(f"a Task with a name like 'my_task' was expected, got {task!r} with name {instance.name!r}")
    _TASKS[instance.name] = instance
    return task


def get_task(task: str | Task) -> Task:
    """The task of this name (a Task is returned as it is).

    Raises:
        ValueError: no task has this name; the message lists those that are known.
    """
    if isinstance(task, Task):
        return task
    if task not in _TASKS:
        raise ValueError(
            f"task is {task!r}, expected one of {', '.join(sorted(_TASKS))}, or one that is registered first"
        )
    return _TASKS[task]


def task_names() -> list[str]:
    """The names of all known tasks, in the order they were registered."""
    return list(_TASKS)


for _task in (Colorization(), Inpainting(), Uncropping(), JPEGRestoration(), Paired()):
    register_task(_task)
