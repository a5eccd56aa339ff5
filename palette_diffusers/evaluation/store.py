"""What was computed, batch by batch, on disk: a kill loses one batch, and memory does not grow with the images."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import write_text


class Store:
    """Batches 0 .. number - 1 of named tensors, whose first dimension is the images'."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"

    def done(self, index: int) -> bool:
        return self.path(index).is_file()

    def write(self, index: int, tensors: dict[str, torch.Tensor], *seconds: float) -> None:
        """Beside it and renamed: a batch is there or it is not. seconds: of restoring, of measuring."""
        part = self.path(index).with_suffix(f".{os.getpid()}.part")
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"seconds": json.dumps(seconds)})
        os.replace(part, self.path(index))

    def read(self, index: int, *names: str) -> list[torch.Tensor]:
        with safe_open(self.path(index), "pt") as file:
            return [file.get_tensor(name) for name in names]

    def stream(self, name: str, rows: int = 1000) -> Iterator[torch.Tensor]:
        """A tensor of all images in order, about `rows` of them at a time."""
        held: list[torch.Tensor] = []
        for index in range(self.number):
            held += self.read(index, name)
            if sum(map(len, held)) >= rows:
                yield torch.cat(held)
                held = []
        if held:
            yield torch.cat(held)

    def rows(self, name: str, indices: np.ndarray) -> torch.Tensor:
        """Those of sorted images (N,)."""
        out, start = [], 0
        for part in self.stream(name):
            here = indices[(indices >= start) & (indices < start + len(part))] - start
            out.append(part[torch.from_numpy(here)])
            start += len(part)
        return torch.cat(out)

    def column(self, name: str) -> np.ndarray:
        """One number of each image that has it: (N,)."""
        out = []
        for index in range(self.number):
            with safe_open(self.path(index), "pt") as file:
                if name in file.keys():
                    out.append(file.get_tensor(name))
        return torch.cat(out).numpy() if out else np.zeros(0)

    def seconds(self, which: int) -> float:
        """How long the batches' restoring (0) or measuring (1) took."""
        total = 0.0
        for index in range(self.number):
            with safe_open(self.path(index), "pt") as file:
                total += json.loads(file.metadata()["seconds"])[which]
        return round(total, 2)


def keep_facts(path: Path, facts: dict[str, Any]) -> None:
    """Writes facts of a run, or checks that they are those that stand there.

    Raises:
        ValueError: a fact that differs from the run's that is to be continued.
    """
    facts = json.loads(json.dumps(facts))
    if not path.is_file():
        write_text(path, json.dumps(facts, indent=2) + "\n")
        return
    there = json.loads(path.read_text())
    for key in sorted({*facts, *there}):
        if there.get(key) != facts.get(key):
            raise ValueError(
                f"{path.parent} holds a run with {key} {there.get(key)!r}, {facts.get(key)!r} came: "
                "ask for the same, or name another folder"
            )
