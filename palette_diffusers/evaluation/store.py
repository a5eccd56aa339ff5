"""What was computed, batch by batch, on disk: a kill loses one batch, and memory does not grow with the images."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import write_text


def fingerprint(*parts: Path | str | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of files (what they hold, not where they are), texts and weights; the first 16 digits.

    >>> fingerprint("a", {"weight": torch.zeros(2)}) == fingerprint("a", {"weight": torch.ones(2)})
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, str):
            digest.update(hashlib.sha256(part.encode()).digest())
        else:
            for name, tensor in part.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


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


def weights_content(weights: Mapping[str, torch.Tensor]) -> str:
    """Of a network's weights, whether they were read in float32 or bfloat16."""
    return fingerprint({name: value.bfloat16() for name, value in weights.items()})


def keep_row(folder: Path, about: dict[str, Any]) -> None:
    """`keep_facts` of a row, after its batches are removed where another restorer of its name made them: told by
    "content".

    Raises:
        ValueError: the same restorer, asked for otherwise.
    """
    path = folder / "about.json"
    there = json.loads(path.read_text()) if path.is_file() else about
    if "weights" in about and "weights" not in there:  # written before they were noted
        write_text(path, json.dumps(there | {"weights": about["weights"]}, indent=2) + "\n")
    if there.get("content") != about.get("content"):
        what = f"{folder.name} of {folder.parent.name}"
        print(f"{what} is not what it was: its figures are made anew (NAME=... keeps both)", file=sys.stderr)
        for batch in folder.glob("batch-*.safetensors"):
            batch.unlink()
        path.unlink()  # last: a kill before leaves the difference to be seen
    keep_facts(path, about)


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
