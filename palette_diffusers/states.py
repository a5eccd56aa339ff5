"""The checkpoints of a run: written whole, rotated, validated on load."""

import io
import json
import os
import pickle
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .settings import FREE, TrainSettings
from .zero import precision_of

DAMAGE = (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


class Noting(io.RawIOBase):
    """A file that keeps the error of a write."""

    error: OSError | None = None

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(getattr(self._file, "name", "")))
            raise
        return done


def save_state(folder: Path, step: int, keep: int = 2, **parts: object) -> Path:
    """Writes a checkpoint beside and renames it, once it is on the disk; then removes all but the newest `keep`."""
    part, final = folder / f"step-{step:07d}.part", folder / f"step-{step:07d}.pt"
    try:
        with open(part, "wb", buffering=0) as stream:
            kept = Noting(stream)
            try:
                torch.save({"step": step, **parts}, kept)
            except RuntimeError:  # torch's writer says no more than that fewer bytes were written
                if kept.error is None:
                    raise
                raise kept.error from None
            os.fsync(stream.fileno())
        os.replace(part, final)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    for old in sorted(path for path in folder.glob("step-*.pt") if path < final)[: 1 - keep or None]:
        old.unlink()
    return final


def last_state(folder: Path) -> dict | None:
    """The newest checkpoint of a run that can be read, or None where there is none. A damaged one (its checksums, which
    `torch.load` does not look at, are) is passed over, and named `.damaged`.

    Raises:
        ValueError: there are checkpoints, and none can be read.
        PermissionError: one may not be read.
    """
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            with zipfile.ZipFile(path) as parts:
                if (wrong := parts.testzip()) is not None:
                    raise ValueError(f"{wrong} is not what was written")
            return torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError:
            raise
        except DAMAGE as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{path} is damaged and passed over: {why}", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} can be read; they are named .damaged now")
    return None


def check_same(folder: Path, settings: TrainSettings) -> None:
    """A run is continued by the settings that began it.

    Raises:
        ValueError: the message says which settings differ.
    """
    path = folder / "settings.json"
    if not path.is_file():
        return
    before = asdict(TrainSettings()) | json.loads(path.read_text())  # of an older version, which had fewer
    before, now = (json.loads(json.dumps(each)) for each in (before, asdict(settings)))
    changed = [name for name in now if name not in FREE and before[name] != now[name]]
    if changed:
        lines = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise ValueError(f"{folder} holds a run of other settings: {lines}")


def check_state(state: dict, read: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """What every process has read of a stream, (processes, workers, 2).

    Raises:
        ValueError: the state was trained in another precision, or its stream was divided over other readers.
    """
    now = precision_of(accelerator)
    precision = state.get("precision", now)
    if precision != now:
        raise ValueError(f"the run was trained with precision {precision}, now it is {now}")
    before = state.get("read", read)
    if before.shape != read.shape:
        (p, w), (processes, workers) = before.shape[:2], read.shape[:2]
        raise ValueError(
            f"the stream was divided over {p} processes of {w} workers, now over {processes} of {workers}: "
            "it goes on only as it was divided"
        )
    return before
