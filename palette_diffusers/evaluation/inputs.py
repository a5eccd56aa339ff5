"""Degraded inputs: fixed by a seed, named by a manifest with hashes, so that two models see the same pixels.

Images are (B, 3, S, S), RGB, [-1, 1]; masks (B, 1, S, S), 1 = generate.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import canvas
from ..masks import border_mask, center_mask, free_form_mask
from ..sources import image_column, load_images, pixels
from ..tasks import Given, get_task, jpeg, task_names
from .features import load_module
from .store import fingerprint

SOURCE_SEED = 1_000_003  # of the sources, apart from those of sampling


def _masked(task: str, draw: Callable[[int, int, torch.Generator], torch.Tensor]) -> Callable[..., Given]:
    def degrade(clean: torch.Tensor, generator: torch.Generator) -> Given:
        mask = draw(clean.shape[-2], clean.shape[-1], generator)[None]
        return get_task(task).prepare(clean, mask, generator)

    return degrade


def _compressed(quality: int) -> Callable[..., Given]:
    return lambda clean, generator: get_task("jpeg_restoration").prepare(jpeg(clean, quality))


# what is measured of a task; a task that is not here degrades as in training
VARIANTS: dict[str, Callable[[torch.Tensor, torch.Generator], Given]] = {
    "inpainting": _masked("inpainting", lambda h, w, g: free_form_mask(h, w, g, area=(0.2, 0.3))),
    "inpainting:center": _masked("inpainting", lambda h, w, g: center_mask(h, w)),
    "uncropping:right": _masked("uncropping", lambda h, w, g: border_mask(h, w, right=w // 2)),
    "jpeg_restoration": _compressed(10),
    "jpeg_restoration:5": _compressed(5),
    "jpeg_restoration:10": _compressed(10),
    "jpeg_restoration:20": _compressed(20),
}
PROTOCOLS = {
    "starter": ("colorization", "inpainting", "uncropping", "jpeg_restoration"),
    "palette": (
        "colorization", "inpainting", "inpainting:center", "uncropping:right",
        "jpeg_restoration:5", "jpeg_restoration:10", "jpeg_restoration:20",
    ),
}  # fmt: skip


def register_tasks(path: str) -> None:
    """Runs a Python file that makes tasks of one's own known (`register_task`).

    Raises:
        FileNotFoundError: no such file. ValueError: it can't be loaded, or registers no task.
    """
    before = {name: get_task(name) for name in task_names()}
    load_module(path)
    if all(get_task(name) is before.get(name) for name in task_names()):
        raise ValueError(f"{path} registers no task, expected a class under @register_task")


def check_variant(variant: str) -> str:
    """The task of a variant.

    Raises:
        ValueError: neither a task nor a variant of one.
    """
    task = variant.partition(":")[0]
    if variant not in VARIANTS and ":" in variant:
        raise ValueError(f"task is {variant!r}, expected a task's name or one of {', '.join(VARIANTS)}")
    return get_task(task).name


def sampling_seed(index: int, seed: int, sample: int = 0) -> int:
    """Of a sample of photograph `index`, in a run of `seed`."""
    return index + 10**7 * seed + 10**13 * sample


def degrade(variant: str, clean: torch.Tensor, index: int, seed: int = 0) -> Given:
    """The source of photograph `index` (1, 3, S, S), the same on every machine.

    >>> degrade("inpainting:center", torch.zeros(1, 3, 8, 8), 0).mask.mean().item()
    0.25
    """
    generator = torch.Generator().manual_seed(sampling_seed(SOURCE_SEED + index, seed))
    made = VARIANTS.get(variant)
    return made(clean, generator) if made else get_task(check_variant(variant)).degrade(clean, generator)


@dataclass(frozen=True)
class Batch:
    """A few photographs as a restorer sees them: `names` without suffix, and a seed of sampling for each."""

    variant: str
    names: list[str]
    given: Given
    seeds: list[int]


def middle_square(picture: Image.Image, size: int) -> torch.Tensor:
    """The largest square in the middle, at `size` pixels: uint8 (3, size, size). Levels of 16 bits are scaled, what is
    transparent shows white."""
    picture = Image.fromarray(pixels(picture))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if picture.size != (side, side):
        picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class Photographs:
    """Originals by their place: uint8 (3, size, size) and the label, -1 where there is none.

    Args:
        path: a folder of images or of parquet files (validation-*.parquet), or a Hub id.
        size: pixels a side; other pictures give their middle square.
        count: the first so many.
        names: a file that lists the pictures' paths in the folder, one a line, each with its label (a number) after a
            space or without (ctest10k, places10k).
        split: of parquet files and Hub ids.

    Raises:
        ValueError: fewer than `count`, an empty list, a WordNet id as a label, or, when it is read, a photograph that
            can't be decoded.
        FileNotFoundError: the folder, the list or a file on it is missing.
    """

    def __init__(
        self, path: str, size: int, count: int | None = None, names: Path | None = None, split: str = "validation"
    ):
        self.path, self.size = path, size
        self.classes: list[str] | None = None
        self.labels: list[int] = []
        self._files: list[Path] = []
        if names is not None:
            self._read(path, names)
            missing = [str(file) for file in self._files if not file.is_file()]
            if missing:
                raise FileNotFoundError(f"{len(missing)} files of {names} are missing, {missing[0]} the first")
        else:
            self._load(path, split)
        if count is not None and count > len(self.labels):
            raise ValueError(f"{path} has {len(self.labels)} photographs, {count} were asked for")
        self.labels = self.labels[:count]

    @property
    def listed(self) -> bool:
        """Whether a file lists the pictures."""
        return bool(self._files)

    def _read(self, path: str, names: Path) -> None:
        lines = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{names} is empty, expected a picture's path a line")
        for line in lines:
            name, *label = line.rsplit(maxsplit=1)
            if label and re.fullmatch(r"n\d{8}", label[0]):
                raise ValueError(f"{names} has {line!r}: {label[0]} is a WordNet id, expected a class's number")
            if label and not re.fullmatch(r"-?\d+", label[0]):  # a name with a space
                name, label = line, []
            self._files.append(Path(path) / name)
            self.labels.append(int(label[0]) if label else -1)

    def _load(self, path: str, split: str) -> None:
        self._rows: Any = load_images(path, split)
        self._column = image_column(self._rows)
        self.classes = getattr(self._rows.features.get("label"), "names", None)
        labels: list[Any] = list(self._rows["label"]) if "label" in self._rows.features else [-1] * len(self._rows)
        if any(isinstance(label, str) for label in labels):
            self.classes = sorted({label for label in labels if label is not None})
            labels = [None if label is None else self.classes.index(label) for label in labels]
        self.labels = [-1 if label is None else int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def content(self) -> str:
        """A hash of all labels, and of 16 pictures spread over the set: two sets of one name and size differ in it."""
        places = np.unique(np.linspace(0, len(self) - 1, 16).round().astype(int)).tolist()
        return fingerprint(json.dumps(self.labels), {str(i): self[i] for i in places})

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            if self._files:
                with Image.open(self._files[index]) as picture:
                    return middle_square(ImageOps.exif_transpose(picture), self.size)
            return middle_square(self._rows[index][self._column], self.size)
        except MemoryError:
            raise
        except Exception as error:  # a decoder raises whatever a damaged file makes it stumble over
            raise ValueError(f"photograph {index} ({self._name(index)}) can't be decoded: {error}") from None

    def _name(self, index: int) -> str:
        from datasets import Image as ImageFeature

        if self._files:
            return str(self._files[index])
        row = self._rows.cast_column(self._column, ImageFeature(decode=False))[index]
        return (row[self._column] or {}).get("path") or self.path

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        return torch.stack([self[i] for i in indices]).float() / 127.5 - 1


def hash_pixels(*images: torch.Tensor | None) -> str:
    """SHA-256 of pictures as 8-bit pixels, the first 16 digits."""
    digest = hashlib.sha256()
    for image in images:
        if image is not None:
            digest.update(str(tuple(image.shape)).encode() + canvas.to_uint8(image.expand(-1, 3, -1, -1)).tobytes())
    return digest.hexdigest()[:16]


def describe(index: int, label: int, clean: torch.Tensor, given: Given) -> dict[str, Any]:
    """A manifest's line: the hashes of the original (1, 3, S, S) and of its source with its mask."""
    mask = None if given.mask is None else given.mask * 2 - 1
    return {
        "name": f"{index:05d}",
        "label": label,
        "original": hash_pixels(clean),
        "source": hash_pixels(given.known, mask),
    }


def compare(lines: list[dict], expected: list[dict], where: object) -> None:
    """Checks lines of one manifest against another's.

    Raises:
        ValueError: the first picture that differs, and in what.
    """
    for line, other in zip(lines, expected, strict=True):
        for key in ("name", "original", "source"):
            if line[key] != other[key]:
                raise ValueError(
                    f"picture {line['name']}: its {key} is {line[key]}, {where} has {other[key]}: not the same pixels"
                )


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: no manifest.
    """
    try:
        manifest = json.loads(path.read_text())
        manifest["images"], manifest["variant"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest, as palette evaluate writes it: {error}") from None
    return manifest
