"""The batches of a run, from workers that end with it."""

import signal
from collections.abc import Generator
from functools import partial
from itertools import cycle
from typing import Any

import torch

from .settings import TrainSettings

WORKERS = 4  # of each loader, where several take turns


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group stops the run from the main process, which saves first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _collate(samples: list[dict[str, torch.Tensor]], without: tuple[str, ...]) -> dict[str, torch.Tensor]:
    from torch.utils.data import default_collate

    return default_collate([{name: v for name, v in sample.items() if name not in without} for sample in samples])


def _loaders(dataset: Any, settings: TrainSettings, start: int, process: int, processes: int) -> list[Any]:
    """Loaders that take turns from step `start` on; several where a GPU may be faster than one thread that feeds it:
    what one thread of each copies to pinned memory, one thread alone would not."""
    from torch.utils.data import DataLoader

    from .data import PositionSampler

    pinned = torch.cuda.is_available()
    turns = max(1, settings.workers // WORKERS) if pinned and not settings.streaming else 1
    size = settings.batch // settings.accumulate // processes
    without = () if settings.teacher else ("known",)  # a fifth of the bytes
    loaders = []
    for turn in range(turns):
        workers = len(range(turn, settings.workers, turns))
        place = dict(turns=turns * processes, turn=turn * processes + process)
        positions = PositionSampler(start * settings.batch, settings.steps * settings.batch, size, **place)
        loader = DataLoader(
            dataset,
            batch_size=size,
            sampler=None if settings.streaming else positions,  # a stream is divided over the processes already
            collate_fn=partial(_collate, without=without),
            num_workers=workers,
            worker_init_fn=_ignore_signals,
            drop_last=True,
            prefetch_factor=4 if workers else None,
            pin_memory=pinned,
        )
        loaders.append(loader)
    return loaders


def batches(
    dataset: Any, settings: TrainSettings, start: int = 0, process: int = 0, processes: int = 1, device: Any = "cpu"
) -> Generator[dict[str, torch.Tensor], None, None]:
    """The batches of a training process from step `start` on, on its device.

    Close it (`contextlib.closing`): workers that ignore signals would keep Python from ending, which waits for them;
    an error's traceback keeps the iterator that would end them by its own end.
    """
    from accelerate.utils import send_to_device

    pinned = torch.cuda.is_available()
    iterators: list[Any] = []
    try:
        for loader in _loaders(dataset, settings, start, process, processes):
            iterators.append(iter(loader))
        for iterator in cycle(iterators):
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (ValueError, OSError) as error:
                raise _unwrapped(error) from None
            yield send_to_device(batch, device, non_blocking=pinned)
    finally:
        for iterator in iterators:
            _end(iterator)


def _unwrapped(error: ValueError | OSError) -> Exception:
    """A worker's error, which the loader gives as text with the worker's traceback, as it was."""
    if not str(error).startswith("Caught "):
        return error
    message = str(error).strip().splitlines()[-1].partition(": ")[2]
    return (OSError if isinstance(error, OSError) else ValueError)(message or str(error))


def _end(iterator: Any) -> None:
    """Ends the workers of a loader's iterator."""
    if hasattr(iterator, "_shutdown_workers"):  # of one that has workers
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
