"""`datasets` columns => training samples. Every sample's randomness is a pure function of (seed, position).

Images are (3, H, W), RGB, [-1, 1]; masks (1, H, W), 1 = generate.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler

from .scheduler import PaletteScheduler
from .tasks import Given, Task, get_task, network_condition

CACHE = 2**30  # bytes of decoded full-size photographs, for each worker
UNREADABLE = (OSError, SyntaxError, AttributeError, UnidentifiedImageError, Image.DecompressionBombError)


def load_images(path: str, split: str = "train"):
    """A folder of parquet files (SPLIT-*.parquet), a folder of images, or a Hub id => a `datasets.Dataset`.

    Raises:
        FileNotFoundError: the folder has neither.
        ValueError: no column holds images; the message lists the columns.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    folder = Path(path)
    if folder.is_dir():
        files = sorted(map(str, folder.glob(f"{split}-*.parquet")))
        if files:
            data = load_dataset("parquet", data_files=files, split="train")
        elif any(p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp") for p in folder.rglob("*")):
            data = load_dataset("imagefolder", data_dir=str(folder), split="train")
        else:
            raise FileNotFoundError(f"{path} holds no {split}-*.parquet and no images")
    elif folder.exists() or path.startswith((".", "/")):
        raise FileNotFoundError(f"{path} is no folder: expected one of parquet files or images, or a Hub id")
    else:
        data = load_dataset(path, split=split)
    if not any(isinstance(feature, ImageFeature) for feature in data.features.values()):
        raise ValueError(f"{path} has no column of images; its columns are {', '.join(data.features)}")
    return data


def image_column(data, column: str = "") -> str:
    """The name of the first column of images, or `column` once it is known to hold images.

    Raises:
        ValueError: no such column; the message lists those there.
    """
    from datasets import Image as ImageFeature

    known = [name for name, feature in data.features.items() if isinstance(feature, ImageFeature)]
    if column and column not in known:
        raise ValueError(f"column {column!r} holds no images; those that do: {', '.join(known)}")
    return column or known[0]


def load_sources(text: str) -> tuple[list, list[float]]:
    """ "PATH@WEIGHT,PATH" => the data sets and their weights, 1 where none is given."""
    data, weights = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        path, _, weight = part.rpartition("@") if "@" in part else (part, "", "1")
        try:
            weights.append(float(weight))
        except ValueError:
            raise ValueError(f"{part!r} was expected to be PATH@WEIGHT, the weight a number") from None
        data.append(load_images(path))
    return data, weights


def only_images(data):
    """The column of images alone, under the name `image`, so that data sets can be concatenated."""
    column = image_column(data)
    data = data.select_columns(column)
    return data if column == "image" else data.rename_column(column, "image")


def _is_gray(picture: np.ndarray) -> bool:
    return bool((picture.max(-1).astype(int) - picture.min(-1)).max() < 8)


def random_crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of the picture at a random scale and phase, resized to (size, size, 3); never upscaled beyond
    1.5 times. uint8 (H, W, 3) => uint8."""
    height, width = picture.shape[:2]
    short = min(height, width)
    side = min(short, max(round(size / 1.5), round(np.exp(rng.uniform(np.log(size / 1.5), np.log(short))))))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return _resize(picture[top : top + side, left : left + side], size)


def largest_square(pictures: list[np.ndarray], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random largest square (the paper's appendix), resized to (size, size, 3); the same one of a pair, whose
    pictures may differ in size."""
    height, width = pictures[0].shape[:2]
    side = min(height, width)
    top, left = rng.integers(0, height - side + 1) / height, rng.integers(0, width - side + 1) / width
    out = []
    for picture in pictures:
        scale = picture.shape[0] / height
        y, x = round(top * picture.shape[0]), round(left * picture.shape[1])
        out.append(_resize(picture[y : y + round(side * scale), x : x + round(side * scale)], size))
    return out


def _resize(picture: np.ndarray, size: int) -> np.ndarray:
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def _tensors(pictures: list[np.ndarray]) -> list[torch.Tensor]:
    """uint8 (H, W, 3) => (1, 3, H, W) in [-1, 1], each."""
    return [torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in pictures]


def _given(task: Task, pictures: list[np.ndarray], generator: torch.Generator) -> tuple[torch.Tensor, Given]:
    """The original (1, 3, H, W), and its source: the second picture of a pair, or what the task makes."""
    clean, *source = _tensors(pictures)
    return clean, task.prepare(source[0]) if source else task.degrade(clean, generator)


@dataclass
class PaletteDataset(Dataset):
    """Training samples by position 0, 1, 2, ... without end: resuming is one integer.

    Epoch e = position // len(images) walks its own permutation. A sample is a dict of `clean`, `condition`,
    `mask` (ones where the task has none), `noise` (3, H, W), `gamma`, `task` (its number), and `skipped` and
    `gray`: how many images could not be decoded or were below the resolution, and how many gray ones a
    colorization could not use, before this one was found.

    Args:
        images: a `datasets.Dataset` with a column of images, or a list of them, drawn by `source_weights`.
        crops: full-size photographs, for JPEG targets (small web images already are JPEGs on an aligned
            grid, which a model would learn to draw); `crop_share` of the other tasks' samples too.
        tasks: names, with `weights` in the same order.
        size: pixels a side.
        scheduler: draws gamma.
        seed: of everything.
        column, source_column: of the images; of the sources, if the data set has pairs.
        condition_dropout: share of samples whose source is noise.
        holes: whether the condition fills holes smoothly and has a channel for them (`tasks.network_condition`).
        strict: an image that can't be used is an error.

    Raises:
        ValueError: no images, an unknown column, weights that don't fit, an unusable image where `strict`.
    """

    images: Any
    scheduler: PaletteScheduler
    tasks: Sequence[str]
    weights: Sequence[float] | None = None
    crops: Any = None
    crop_share: float = 0.3
    size: int = 64
    seed: int = 0
    column: str = ""
    source_column: str = ""
    source_weights: Sequence[float] | None = None
    condition_dropout: float = 0.0
    strict: bool = False
    holes: bool = False

    def __post_init__(self) -> None:
        self._sources = list(self.images) if isinstance(self.images, (list, tuple)) else [self.images]
        if not self._sources or any(len(source) == 0 for source in self._sources):
            raise ValueError("the data set is empty")
        self._shares = self._share("task weights", self.weights, self.tasks)
        self._source_shares = self._share("source weights", self.source_weights, self._sources)
        self._tasks = [get_task(name) for name in self.tasks]
        self._columns = [image_column(source, self.column) for source in self._sources]
        if self.source_column:
            for source in self._sources:
                image_column(source, self.source_column)
        self._crop_column = image_column(self.crops) if self.crops is not None else ""
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @staticmethod
    def _share(name: str, weights: Sequence[float] | None, what: Sequence) -> np.ndarray:
        shares = np.asarray(weights or [1.0] * len(what), float)
        if len(shares) != len(what) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"{name} are {list(shares)}, expected {len(what)} numbers of at least 0, not all 0")
        return shares / shares.sum()

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources)

    def _crop_photo(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A full-size photograph, and how many were unusable; the latest CACHE bytes of them stay decoded."""
        for skipped in range(100):
            index = int(rng.integers(len(self.crops)))
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index], skipped
            try:
                photo = np.asarray(self.crops[index][self._crop_column].convert("RGB"))
                why = f"is {photo.shape[1]}x{photo.shape[0]}, below {self.size} pixels"
            except UNREADABLE as error:
                photo, why = np.zeros((0, 0, 3), np.uint8), f"can't be decoded: {error}"
            if min(photo.shape[:2]) >= self.size:
                self._cache[index] = photo
                self._cached += photo.nbytes
                while self._cached > CACHE and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
                return photo, skipped
            if self.strict:
                break
        raise ValueError(f"photograph {index} of the crops {why}")

    def _index(self, number: int, position: int) -> int:
        """The image of source `number` at a position: each epoch its own permutation."""
        length = len(self._sources[number])
        epoch, index = divmod(position, length)
        if self._orders.get(number, (-1,))[0] != epoch:
            seed = (self.seed, 1, epoch) if number == 0 else (self.seed, 1, epoch, number)
            self._orders[number] = (epoch, np.random.default_rng(seed).permutation(length))
        return int(self._orders[number][1][index])

    def _photos(self, position: int, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
        """The images of one row (target, and source if there are pairs), and how many rows were unusable."""
        skipped = 0
        while True:
            number = 0 if len(self._sources) == 1 else int(rng.choice(len(self._sources), p=self._source_shares))
            index = self._index(number, position)
            columns = [self._columns[number]] + ([self.source_column] if self.source_column else [])
            try:
                row = self._sources[number][index]
                photos = [np.asarray(row[column].convert("RGB")) for column in columns]
                shapes = [photo.shape[1] / photo.shape[0] for photo in photos]
                if max(shapes) > 1.02 * min(shapes):
                    raise ValueError(f"row {index}: target and source have shapes {[p.shape[:2] for p in photos]}")
                if min(min(photo.shape[:2]) for photo in photos) >= self.size:
                    return photos, skipped
                why = f"is {photos[0].shape[1]}x{photos[0].shape[0]}, below {self.size} pixels"
            except UNREADABLE as error:
                why = f"can't be decoded: {error}"
            skipped += 1
            if self.strict or skipped >= 100:
                more = "" if self.strict else f" (and {skipped - 1} before it could not be used either)"
                raise ValueError(f"image {index} of source {number} {why}{more}")
            position = int(rng.integers(len(self._sources[number])))

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        # torch's generator has 32 bits of seed, so that two of many samples would share their noise: numpy draws it
        rng = np.random.default_rng((self.seed, 0, position))
        generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
        number = int(rng.choice(len(self._tasks), p=self._shares))
        task = self._tasks[number]
        share = 1.0 if task.name == "jpeg_restoration" else self.crop_share
        skipped = gray = 0
        if self.crops is not None and not self.source_column and rng.random() < share:
            photo, skipped = self._crop_photo(rng)
            pictures = [random_crop(photo, self.size, rng)]
        else:
            photos, skipped = self._photos(position, rng)
            pictures = largest_square(photos, self.size, rng)
        if task.name == "colorization":
            while _is_gray(pictures[0]) and gray < 20:  # a gray target would teach the model not to colorize
                photos, more = self._photos(int(rng.integers(len(self))), rng)
                pictures, gray, skipped = largest_square(photos, self.size, rng), gray + 1, skipped + more
        if rng.random() < 0.5:
            pictures = [picture[:, ::-1] for picture in pictures]
        original, given = _given(task, pictures, generator)
        clean = original[0]
        condition = network_condition(given, self.holes)[0]
        if self.condition_dropout and rng.random() < self.condition_dropout:
            condition = torch.cat([torch.randn(clean.shape, generator=generator), condition[3:]])  # may be the original
        return {
            "clean": clean,
            "condition": condition,
            "mask": torch.ones(1, *clean.shape[1:]) if given.mask is None else given.mask[0],
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "gamma": self.scheduler.sample_gamma(1, generator)[0],
            "task": torch.tensor(number),
            "skipped": torch.tensor(skipped),
            "gray": torch.tensor(gray),
        }

    def fixed(self, task: str, number: int) -> list[tuple[torch.Tensor, Given]]:
        """The same `number` originals (1, 3, size, size) and sources at every call, for looking at."""
        out = []
        for k in range(number):
            rng, generator = np.random.default_rng((self.seed, 2, k)), torch.Generator().manual_seed(k)
            photos, _ = self._photos(int(rng.integers(len(self))), rng)
            out.append(_given(get_task(task), largest_square(photos, self.size, rng), generator))
        return out


class PositionSampler(Sampler[int]):
    """Positions start, start + 1, ..., stop - 1: the order is the data set's own."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)
