"""Visitors share the network: what their jobs ask of it at the same time, at one size, is evaluated as one batch. Jobs
of a student beside it share that in the same way, and take turns with the others.

A job keeps a pipeline, a solver, steps, seed, previews and Stop of its own: it only asks here instead of the network,
which takes a noise level for each sample. So jobs of any task, solver and step meet, come and go at every step, and
each gets the picture that it would get alone.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition

import torch

from .pipeline import BATCH, PalettePipeline, evaluate

PATIENCE = 0.02  # seconds, and no longer than the last took, that an evaluation waits for jobs between two of theirs


class Stopped(Exception):
    """The visitor stopped the work, or left."""


@dataclass(eq=False)
class _Asked:
    """One evaluation: sample (B, 3, H, W), gamma (), condition (B, C, H, W)."""

    network: torch.nn.Module
    sample: torch.Tensor
    gamma: torch.Tensor
    condition: torch.Tensor
    answer: Future[torch.Tensor] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[torch.nn.Module, torch.Size, torch.Size]:
        """What those of a batch agree in."""
        return self.network, self.sample.shape[1:], self.condition.shape[1:]

    @property
    def pixels(self) -> int:
        return self.sample[:, 0].numel()


@dataclass(eq=False)
class _Room:
    """pixels: that jobs may hold together; held: that they do. line: jobs that wait."""

    pixels: int
    held: int = 0
    line: list[object] = field(default_factory=list)


class SharedNetwork:
    """The network of `pipe` (and others of its size), for jobs that hold at most `pixels` of photographs together, so
    that memory is bounded; and small ones a quarter of that besides, so that a large one does not keep them waiting."""

    def __init__(self, pipe: PalettePipeline, pixels: int):
        self._evaluate = evaluate
        self._most = BATCH * pipe.unet.config.sample_size**2  # pixels of a batch
        self._asked: list[_Asked] = []
        self._worker = ThreadPoolExecutor(1)
        self._changed = Condition()
        self._took = 0.0  # seconds, by the last evaluation
        self._jobs = 0
        self._large, self._small = _Room(pixels), _Room(pixels // 4)

    @contextmanager
    def job(
        self, pipe: PalettePipeline, pixels: int, stopped: Callable[[], bool], waits: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """`pipe` asks here while this lasts; first come, first served, once there is room for its `pixels`, among those
        of its kind: small ones are a 16th of what all may hold. `waits` is called where there is none yet.

        Raises:
            Stopped: `stopped()` before there was.
        """
        room = self._small if pixels <= self._large.pixels // 16 else self._large
        pixels = min(pixels, room.pixels)
        own, told = object(), False
        with self._changed:
            room.line.append(own)
            try:
                while room.line[0] is not own or room.held + pixels > room.pixels:
                    if not told:
                        waits()
                        told = True
                    self._changed.wait(0.1)
                    if stopped():
                        raise Stopped
                room.held += pixels
                self._jobs += 1
            finally:
                room.line.remove(own)
                self._changed.notify_all()
        pipe._predict = partial(self.predict, pipe.unet)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del pipe._predict
            with self._changed:
                room.held -= pixels
                self._jobs -= 1
                self._changed.notify_all()

    def predict(
        self, network: torch.nn.Module, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """As `PalettePipeline._predict`; of the tiles of a large photograph, some at a time, so that others get on."""
        step = max(1, self._most // sample[0, 0].numel())
        if self._jobs < 2 or len(sample) <= step:
            return self._ask(_Asked(network, sample, gamma, condition))
        parts = zip(sample.split(step), condition.split(step), strict=True)
        return torch.cat([self._ask(_Asked(network, some, gamma, given)) for some, given in parts])

    def _ask(self, asked: _Asked) -> torch.Tensor:
        with self._changed:
            self._asked.append(asked)
            self._changed.notify_all()
        self._worker.submit(self._turn)
        return asked.answer.result()

    @torch.no_grad()
    def _turn(self) -> None:
        """The one that has waited longest, and all that fit to it."""
        until = time.monotonic() + min(PATIENCE, self._took)
        with self._changed:
            if not self._asked:
                return
            while len(self._asked) < self._jobs and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            first, *others = self._asked
            together, room = [first], self._most - first.pixels
            for other in others:
                if other.kind == first.kind and other.pixels <= room:
                    together.append(other)
                    room -= other.pixels
            self._asked = [asked for asked in self._asked if asked not in together]
        begun = time.monotonic()
        self._answer(together)
        self._took = time.monotonic() - begun

    def _answer(self, together: list[_Asked]) -> None:
        if len(together) > 1:
            try:
                answers = self._as_one(together)
            except Exception:  # whose fault it is shows when each is alone
                pass
            else:
                for asked, answer in zip(together, answers, strict=True):
                    asked.answer.set_result(answer)
                return
        for asked in together:
            try:
                asked.answer.set_result(self._evaluate(asked.network, asked.sample, asked.gamma, asked.condition))
            except Exception as error:
                asked.answer.set_exception(error)

    def _as_one(self, together: list[_Asked]) -> tuple[torch.Tensor, ...]:
        numbers = [len(asked.sample) for asked in together]
        sample = torch.cat([asked.sample for asked in together])
        gamma = torch.cat([asked.gamma.to(sample.device).expand(n) for asked, n in zip(together, numbers, strict=True)])
        condition = torch.cat([asked.condition for asked in together])
        return self._evaluate(together[0].network, sample, gamma, condition).split(numbers)
