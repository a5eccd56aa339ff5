"""What happens when a visitor of the demo clicks, or a program calls: values are checked, the pipeline works."""

import random
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from . import canvas, masks
from .demo_batches import SharedNetwork, Stopped
from .demo_files import scratch
from .demo_jobs import (
    LOST,
    SOLVERS,
    Step,
    Stops,
    Waiting,
    borrowing_gpu,
    friendly,
    on_zero_gpu,
    pixels_of,
    watch,
    with_solver,
)
from .demo_limits import Failed, Limits, choice, number, open_upload, stem, whole
from .machine import accelerator_lost, without_team
from .pipeline import PalettePipeline
from .speed import FAST, SPEEDS

SHOWN = 1280  # pixels of the longer side on the page; files are full size
SEEDS = 2**31 - 1
ASPECTS = {"Own": 0.0, "Square": 1.0, "4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9, "9:16": 9 / 16, "Panorama 3:1": 3.0}
MOST_PERCENT = 400  # of a side that is added
STANDARD = "Standard"  # the steps and solver that are given
SPEED_NAMES = {STANDARD: None} | {name.capitalize(): name for name in SPEEDS}
BATCH_TASKS = {"Colorize": "colorization", "Restore JPEG": "jpeg_restoration"}


@dataclass(frozen=True)
class Settings:
    """What stands below the tabs, checked. A speed chooses solver and steps, which are here those of its name."""

    seed: int
    steps: int
    samples: int
    solver: str | None
    speed: str | None = None

    @classmethod
    def checked(
        cls, limits: Limits, seed: Any, anew: Any, samples: Any, steps: Any, solver: Any, speed: Any
    ) -> "Settings":
        """A speed stands for a solver and its steps, and overrides both."""
        chosen = choice("speed", speed, SPEED_NAMES)
        if chosen:
            name, number = None, min(SPEEDS[chosen][1], limits.max_steps)
        else:
            name, number = choice("solver", solver, SOLVERS), whole("steps", steps, 1, limits.max_steps)
        return cls(
            seed=random.randrange(SEEDS) if anew is True else whole("seed", seed, 0, SEEDS),
            steps=number,
            samples=whole("variations", samples, 1, limits.max_samples),
            solver=name,
            speed=chosen,
        )


@dataclass(frozen=True)
class Result:
    """A finished picture in full size, and the photo as its counterpart; `name` becomes the file's."""

    name: str
    caption: str
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True)
class Refused:
    """A photo of several that could not be done, and why."""

    name: str
    reason: str


Moment = Step | Waiting | Result | Refused


def smaller(image: Image.Image, side: int = SHOWN) -> Image.Image:
    """A copy of at most `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def write(image: Image.Image, path: Path) -> str:
    """As PNG, with what its file told (date, place, rights), and packed fast: a visitor waits for it.

    Raises:
        Failed: it can't be written, as where the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(image, path, compress_level=1)
    except OSError as error:
        raise friendly(error) from None
    return str(path)


def gpu_seconds(
    picture: canvas.Picture, task: str, seed: int, settings: Settings, job: int, options: dict[str, Any]
) -> float:
    """What is asked of ZeroGPU for one variation: a generous guess by steps and pixels, 10 to 120 seconds."""
    return min(120.0, 10 + settings.steps * pixels_of(picture, options) / 1e6)


class Handlers:
    """Around one pipeline, and its student for few steps where it has `few`. A visitor's value is of any type until it
    is checked here."""

    def __init__(self, pipe: PalettePipeline, limits: Limits, few: PalettePipeline | None = None):
        self.pipe, self.few, self.limits = pipe, few, limits
        self.stops = Stops()
        self.unwell = ""  # what no later job can get round
        # ZeroGPU runs each job in a process of its own
        self.shared = None if on_zero_gpu() else SharedNetwork(pipe, limits.max_pixels)
        self.steps = borrowing_gpu(self._steps, gpu_seconds)
        # of the page's two editors
        self.read_mask: Callable[[dict], list[Any]] = lambda brush: []
        self.read_strokes: Callable[[dict], list[Any]] = lambda brush: []

    def photo(self, payload: Any, what: str = "photo") -> canvas.Picture:
        """What Gradio received => the picture, or a message for the visitor."""
        without_team()
        image = open_upload(payload, self.limits, what)
        try:
            return self.limits.picture(image)
        except (ValueError, TypeError, OSError, MemoryError) as error:
            raise friendly(error) from None

    def mask(self, picture: canvas.Picture, brush: Any, upload: Any, invert: Any, pixels: Any) -> torch.Tensor:
        """What was painted and what was uploaded, together: (1, 1, H, W)."""
        height, width = picture.size
        mask = torch.zeros(1, 1, height, width)
        for layer in self._layers(brush, self.read_mask):
            painted = layer.convert("RGBA").getchannel("A").resize((width, height), Image.Resampling.BILINEAR)
            mask[torch.from_numpy(np.asarray(painted) > 40)[None, None]] = 1
        if upload is not None:
            uploaded = self._beside(picture, upload, "mask")
            mask = torch.maximum(mask, (uploaded.image.mean(1, keepdim=True) > 0).float())
        if not mask.any():
            raise gr.Error("Paint over what should go, or upload a mask (white = fill in).")
        return masks.grow(1 - mask if invert is True else mask, whole("grow", pixels, 0, 64))

    def hints(self, picture: canvas.Picture, brush: Any, upload: Any) -> dict[str, Any]:
        """What was painted over what was uploaded => the pipeline's `hints`, nothing where there is no stroke."""
        height, width = picture.size
        strokes = Image.new("RGBA", (width, height))
        if upload is not None:
            uploaded = self._beside(picture, upload, "picture of strokes")
            if uploaded.alpha is None:
                raise gr.Error("The picture of strokes has no transparency: only the strokes must be opaque.")
            strokes = canvas.to_pil(uploaded.image, replace(uploaded, deep=False, info={}))
        for layer in self._layers(brush, self.read_strokes):
            strokes.alpha_composite(layer.convert("RGBA").resize((width, height), Image.Resampling.BILINEAR))
        opaque = strokes.getchannel("A").point(lambda value: value > 127)
        return {"hints": strokes} if upload is not None or opaque.getbbox() else {}

    def _beside(self, picture: canvas.Picture, upload: Any, what: str) -> canvas.Picture:
        """What was uploaded for a photo, and must have its size."""
        uploaded = self.photo(upload, what)
        if uploaded.size != picture.size:
            (h, w), (height, width) = uploaded.size, picture.size
            raise gr.Error(f"The {what} is {w}x{h}, the photo {width}x{height}: they must have the same size.")
        return uploaded

    def _layers(self, brush: Any, read: Callable[[dict], list[Any]]) -> list[Image.Image]:
        layers = []
        for given in read(brush) if isinstance(brush, dict) else ():
            try:
                layer = open_upload(given, self.limits, "painting")
                self.limits.check(layer)
                layers.append(layer.convert("RGBA"))
            except (ValueError, OSError, SyntaxError, MemoryError, Image.DecompressionBombError):
                raise gr.Error("What was painted can't be read: paint it again.") from None
        return layers

    def sides(self, picture: canvas.Picture, left: Any, right: Any, top: Any, bottom: Any) -> dict[str, int]:
        """Percent of the side => pixels."""
        height, width = picture.size
        percent = {"left": left, "right": right, "top": top, "bottom": bottom}
        lengths = {"left": width, "right": width, "top": height, "bottom": height}
        parts = {k: number(k, v, 0, MOST_PERCENT) / 100 * lengths[k] for k, v in percent.items()}
        sides = {k: max(1, round(part)) if part else 0 for k, part in parts.items()}
        if not any(sides.values()):
            raise gr.Error("Choose a shape, or move a slider: no side is extended yet.")
        new = (width + sides["left"] + sides["right"], height + sides["top"] + sides["bottom"])
        if new[0] * new[1] > self.limits.max_pixels:
            limit = self.limits.max_pixels / 1e6
            raise gr.Error(f"The extended picture would be {new[0]}x{new[1]}; the limit is {limit:g} megapixels.")
        return sides

    def moments(
        self, task: str, payload: Any, picture: canvas.Picture, settings: Settings, session: str, **options: Any
    ) -> Iterator[Moment]:
        """All variations of one photo, step by step, each from its own seed.

        Raises:
            Stopped: the visitor stopped it. gr.Error: what the pipeline refused.
        """
        with self.stops.job(session) as job:
            yield from self._each(task, payload, picture, settings, job, options)

    def batch(self, task: str, payloads: list, settings: Settings, session: str) -> Iterator[Moment]:
        """Photo after photo, as one job: one that is refused is told (`Refused`), and the others go on.

        Raises:
            Stopped: the visitor stopped it. gr.Error: no photo can be done any more.
        """
        with self.stops.job(session) as job:
            for payload in payloads:
                if self.stops.event(job).is_set():
                    raise Stopped
                try:
                    yield from self._each(task, payload, self.photo(payload), settings, job, {})
                except gr.Error as error:
                    if self.unwell:
                        raise
                    yield Refused(stem(payload), error.message)

    def _each(
        self, task: str, payload: Any, picture: canvas.Picture, settings: Settings, job: int, options: dict[str, Any]
    ) -> Iterator[Moment]:
        begun = None  # waiting does not count
        for seed in range(settings.seed, settings.seed + settings.samples):
            with closing(self._one(task, payload, picture, seed, settings, job, options)) as moments:
                for moment in moments:
                    yield moment
                    now = time.monotonic()
                    begun = now if begun is None and isinstance(moment, Step) else begun
                    if begun is not None and now - begun > self.limits.max_seconds:
                        limit = f"{self.limits.max_seconds} seconds"
                        raise Failed(f"This takes more than {limit}, the limit: take fewer steps, or a smaller photo.")

    def _one(
        self, task: str, payload: Any, picture: canvas.Picture, seed: int, settings: Settings, job: int,
        options: dict[str, Any],
    ) -> Generator[Moment, None, None]:  # fmt: skip
        without_team()
        steps = self.steps(picture, task, seed, settings, job, options)
        try:
            for moment in steps:
                if self.stops.event(job).is_set():
                    raise Stopped
                if isinstance(moment, (Step, Waiting)):
                    yield moment
                else:
                    before = canvas.to_pil(picture.image)
                    if before.size != moment.size:
                        photo, before = before, Image.new("RGB", moment.size, (128, 128, 128))
                        before.paste(photo, (options["left"], options["top"]))
                    yield Result(f"{stem(payload)}-{task}", f"seed {seed}", before, moment)
        finally:
            steps.close()  # type: ignore[attr-defined]

    def _steps(
        self, picture: canvas.Picture, task: str, seed: int, settings: Settings, job: int, options: dict[str, Any]
    ) -> Iterator[Step | Waiting | Image.Image]:
        """One variation, watched; what is given and what comes can go from process to process."""
        pipe = with_solver(self.few if self.few and settings.speed == FAST else self.pipe, settings.solver)
        number = settings.steps
        if settings.speed:
            number = min(pipe.speed(settings.speed).config.default_steps, self.limits.max_steps)
        steps = watch(
            pipe,
            picture,
            self.stops.event(job),
            self.shared,
            task=task,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=number,
            max_pixels=self.limits.max_pixels,
            **options,
        )
        try:
            yield from steps
        except (Stopped, gr.Error):
            raise
        except Exception as error:
            self.unwell = LOST if accelerator_lost(error) else self.unwell
            raise friendly(error) from None

    # for programs: previews are yielded, and the finished picture last

    def colorize(self, image: Any, seed: Any, steps: Any, speed: Any, request: gr.Request) -> Iterator[Any]:
        """Colours a grayscale photograph; its own luma is kept.

        Args:
            image: the photograph.
            seed: the same seed makes the same picture.
            steps: network evaluations; more take longer.
            speed: Standard, or Fast, Balanced or Best, which choose solver and steps themselves.
        """
        yield from self._answer("colorization", image, seed, steps, speed, request)

    def colorize_with_hints(
        self, image: Any, hints: Any, seed: Any, steps: Any, speed: Any, request: gr.Request
    ) -> Iterator[Any]:
        """Colours a grayscale photograph, told what colours things have; its own luma is kept.

        Args:
            image: the photograph.
            hints: a transparent picture of the same size with strokes of colour, which spread up to edges.
            seed: the same seed makes the same picture.
            steps: network evaluations; more take longer.
            speed: Standard, or Fast, Balanced or Best, which choose solver and steps themselves.
        """
        picture = self.photo(image)
        options = self.hints(picture, None, hints)
        yield from self._answer("colorization", image, seed, steps, speed, request, picture, **options)

    def inpaint(self, image: Any, mask: Any, seed: Any, steps: Any, speed: Any, request: gr.Request) -> Iterator[Any]:
        """Fills a hole in a photograph; every other pixel is kept bit for bit.

        Args:
            image: the photograph.
            mask: a picture of the same size, white = fill in.
            seed: the same seed makes the same picture.
            steps: network evaluations; more take longer.
            speed: Standard, or Fast, Balanced or Best, which choose solver and steps themselves.
        """
        picture = self.photo(image)
        hole = self.mask(picture, None, mask, False, 0)
        yield from self._answer("inpainting", image, seed, steps, speed, request, picture, mask_image=hole)

    def uncrop(
        self, image: Any, left: Any, right: Any, top: Any, bottom: Any, seed: Any, steps: Any, speed: Any, trim: Any,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """Extends a photograph beyond its border; the given pixels are kept bit for bit, but for what `trim` takes.

        Args:
            image: the photograph.
            left: percent of the width to add on the left.
            right: percent of the width to add on the right.
            top: percent of the height to add at the top.
            bottom: percent of the height to add at the bottom.
            seed: the same seed makes the same picture.
            steps: network evaluations; more take longer.
            speed: Standard, or Fast, Balanced or Best, which choose solver and steps themselves.
            trim: whether lines along extended sides, as scans have them, are made anew.
        """
        picture = self.photo(image)
        sides = self.sides(picture, left, right, top, bottom)
        options: dict[str, Any] = {**sides, "trim": trim is True}
        yield from self._answer("uncropping", image, seed, steps, speed, request, picture, **options)

    def restore_jpeg(self, image: Any, seed: Any, steps: Any, speed: Any, request: gr.Request) -> Iterator[Any]:
        """Takes the blocks and ringing out of a JPEG.

        Args:
            image: the photograph.
            seed: the same seed makes the same picture.
            steps: network evaluations; more take longer.
            speed: Standard, or Fast, Balanced or Best, which choose solver and steps themselves.
        """
        yield from self._answer("jpeg_restoration", image, seed, steps, speed, request)

    def _answer(
        self, task: str, payload: Any, seed: Any, steps: Any, speed: Any, request: gr.Request,
        picture: canvas.Picture | None = None, **options: Any,
    ) -> Iterator[Any]:  # fmt: skip
        settings = Settings.checked(self.limits, seed, False, 1, steps, next(iter(SOLVERS)), speed)
        picture = picture or self.photo(payload)
        session = request.session_hash or ""
        last = time.monotonic()
        with scratch() as folder:
            try:
                for moment in self.moments(task, payload, picture, settings, session, **options):
                    if isinstance(moment, Result):
                        yield write(moment.after, Path(folder) / f"{moment.name}.png")
                    elif isinstance(moment, Step) and time.monotonic() - last > 1:
                        yield write(moment.picture, Path(folder) / "preview.png")
                        last = time.monotonic()
            except Stopped:
                raise gr.Error("Stopped.") from None


def pack(paths: list[str], folder: Path) -> str:
    """Several PNG files as one zip, without names that meet.

    Raises:
        Failed: as `write`.
    """
    target = folder / "palette.zip"
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for i, path in enumerate(paths):
                archive.write(path, f"{i + 1:02d}-{Path(path).name}")
    except OSError as error:
        raise friendly(error) from None
    return str(target)
