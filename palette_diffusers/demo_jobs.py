"""The pipeline watched while it works: a generator of what it predicts, which can be stopped within one step."""

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from PIL import Image

from . import canvas
from .demo_batches import SharedNetwork, Stopped
from .demo_limits import Failed
from .machine import accelerator_lost, memory_full, without_team
from .pipeline import PalettePipeline
from .speed import build, named

LOST = "The server's graphics processor failed or is gone: it works again once the server is restarted."
LARGE = 1_000_000  # pixels, of which what is done beside the network gains from several threads
SOLVERS = {
    "The model's own": None,
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
}


@dataclass(frozen=True)
class Step:
    """One step is done. number: from 1 to `of`; level: 1, 2, ... where a hole is filled coarse to fine;
    seconds: what is left of this level; picture: what the network predicts, at its size, thinned out above 320."""

    number: int
    of: int
    level: int
    seconds: float
    picture: Image.Image


@dataclass(frozen=True)
class Waiting:
    """Other photographs take all the room there is."""


class Stops:
    """Who may stop what: the jobs of each visitor's session."""

    def __init__(self) -> None:
        self._numbers = count()
        self._jobs: dict[int, tuple[str, Event]] = {}
        self._places: dict[str, int] = {}  # of sessions whose page shows some work
        self._lock = Lock()

    @contextmanager
    def job(self, session: str) -> Iterator[int]:
        """A new job, as long as this lasts; its number."""
        number = next(self._numbers)
        self._jobs[number] = session, Event()
        try:
            yield number
        finally:
            del self._jobs[number]

    def take_place(self, session: str) -> int | None:
        """The place of the one work that a session's page shows, until it is left, or stopped; None where another one
        has it."""
        with self._lock:
            if session in self._places or self.busy(session):
                return None
            self._places[session] = next(self._numbers)
            return self._places[session]

    def leave_place(self, session: str, place: int) -> None:
        with self._lock:
            if self._places.get(session) == place:
                del self._places[session]

    def busy(self, session: str) -> bool:
        """Whether a job of the session is at work that nobody stopped."""
        return any(whose == session and not event.is_set() for whose, event in list(self._jobs.values()))

    def event(self, number: int) -> Event:
        """What stops this job; another process knows none, and there it is never set."""
        return self._jobs[number][1] if number in self._jobs else Event()

    def stop(self, session: str) -> int:
        """Stops every job of the session; their number."""
        with self._lock:
            self._places.pop(session, None)
        events = [event for whose, event in list(self._jobs.values()) if whose == session]
        for event in events:
            event.set()
        return len(events)


def on_zero_gpu() -> bool:
    """Whether this is a Space whose GPU is there during decorated calls only."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def borrowing_gpu(function: Callable[..., Iterator], seconds: Callable[..., float]) -> Callable[..., Iterator]:
    """On ZeroGPU, a generator that is run by a process with the GPU, for at most `seconds` of the same arguments, which
    are pickled; closing it ends the work there. Elsewhere, the generator itself."""
    if not on_zero_gpu():
        return function
    import spaces

    return spaces.GPU(function, duration=seconds)


def with_solver(pipe: PalettePipeline, name: str | None) -> PalettePipeline:
    """The same network under a scheduler of its own: a scheduler's state belongs to one job."""
    config = pipe.scheduler.config
    own = PalettePipeline(
        unet=pipe.unet,
        scheduler=named(name, config) if name else build(type(pipe.scheduler), config),
        tasks=pipe.config.tasks,
        default_task=pipe.config.default_task,
        default_steps=pipe.config.default_steps,
        few_steps=pipe.config.few_steps,
    )
    own.set_progress_bar_config(disable=True)
    return own


def pixels_of(picture: canvas.Picture, options: dict[str, Any]) -> int:
    """Of the result: of an extended photo, more than it has."""
    height, width = picture.size
    height += options.get("top", 0) + options.get("bottom", 0)
    width += options.get("left", 0) + options.get("right", 0)
    return height * width


def watch(
    pipe: PalettePipeline, picture: canvas.Picture, stop: Event, shared: SharedNetwork | None = None, **options: Any
) -> Iterator[Step | Waiting | Image.Image]:
    """`pipe(picture, **options)` in a thread: every step as it is done, and the finished picture last; on a `shared`
    network, beside other jobs, or after them.

    Closing the generator, as Gradio does when the browser has left, stops the work too.

    Raises:
        Stopped: `stop` was set. What the pipeline raises comes through.
    """
    news: SimpleQueue[Step | Waiting | Image.Image | BaseException] = SimpleQueue()
    gone = Event()  # nobody looks any more
    level, begun, finest = 0, time.monotonic(), 0
    pixels = pixels_of(picture, options)

    def tell(pipe: PalettePipeline, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        nonlocal level, begun, finest
        if stop.is_set() or gone.is_set():
            raise Stopped
        side = max(tensors["pred_original_sample"].shape[-2:])
        if step == 0:
            begun = begun if level == 0 else time.monotonic()
        if step == 0 and side > 1.5 * finest or level == 0:  # strips of a border are of one level
            level, finest = level + 1, side
        of = pipe.num_timesteps
        left = (time.monotonic() - begun) / (step + 1) * (of - step - 1)
        news.put(Step(step + 1, of, level, left, _shown(tensors["pred_original_sample"][:1])))
        return {}

    def work() -> None:
        try:
            if shared and pixels < LARGE:
                without_team()  # nearly all is the network's, whose thread has one
            ended = lambda: stop.is_set() or gone.is_set()  # noqa: E731
            wait = lambda: news.put(Waiting())  # noqa: E731
            with shared.job(pipe, pixels, ended, wait) if shared else nullcontext():
                done: Any = pipe(picture, callback_on_step_end=tell, **options)
            news.put(done.images[0])
        except BaseException as error:  # handed over to the one who waits
            news.put(error)

    Thread(target=work, daemon=True).start()
    try:
        while True:
            came = news.get()
            while not news.empty():  # who is slow to look sees fewer steps, not old ones
                came = news.get()
            if isinstance(came, BaseException):
                raise came
            yield came
            if isinstance(came, Image.Image):
                return
    finally:
        gone.set()


def _shown(predicted: torch.Tensor, side: int = 320) -> Image.Image:
    every = math.ceil(max(predicted.shape[-2:]) / side)
    return canvas.to_pil(predicted[..., ::every, ::every])


def friendly(error: Exception) -> Failed:
    """An error as a message for the visitor: what was refused, in its own words; of the server's troubles, which the
    log has in full, what to do."""
    text = str(error)
    if isinstance(error, (ValueError, TypeError, FloatingPointError)):
        return Failed(text[:1].upper() + text[1:])
    logging.getLogger(__name__).error("a job failed", exc_info=error)
    if accelerator_lost(error):
        return Failed(LOST)
    if memory_full(error):
        return Failed("The server has no memory left for this photo: try a smaller one, or again in a minute.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("The server's disk is full: try again later.")
    return Failed("The server failed at this photo; its log says why. Try again, or another photo.")
