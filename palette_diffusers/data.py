"""`datasets` columns => training samples. Every sample's randomness is a pure function of (seed, position).

Images are (3, H, W), RGB, [-1, 1]; masks (1, H, W), 1 = generate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from .masks import numpy_generator
from .scheduler import PaletteScheduler
from .tasks import get_task


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


def image_column(data) -> str:
    """The name of the first column of images."""
    from datasets import Image as ImageFeature

    return next(name for name, feature in data.features.items() if isinstance(feature, ImageFeature))


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


def largest_square(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random largest square (the paper's appendix), resized to (size, size, 3)."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return _resize(picture[top : top + side, left : left + side], size)


def _resize(picture: np.ndarray, size: int) -> np.ndarray:
    if picture.shape[0] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


@dataclass
class PaletteDataset(Dataset):
    """Training samples by position 0, 1, 2, ... without end: resuming is one integer.

    Epoch e = position // len(images) walks its own permutation. A sample is a dict of `clean`, `condition`,
    `mask` (ones where the task has none), `noise` (3, H, W), `gamma` and `task` (its number).

    Args:
        images: a `datasets.Dataset` with a column of images.
        crops: full-size photographs, for JPEG targets (small web images already are JPEGs on an aligned
            grid, which a model would learn to draw); `crop_share` of the other tasks' samples too.
        tasks: names, with `weights` in the same order.
        size: pixels a side.
        scheduler: draws gamma.
        seed: of everything.
    """

    images: object
    scheduler: PaletteScheduler
    tasks: Sequence[str]
    weights: Sequence[float] | None = None
    crops: object | None = None
    crop_share: float = 0.15
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.images) == 0:  # type: ignore[arg-type]
            raise ValueError("the data set is empty")
        weights = np.asarray(self.weights or [1.0] * len(self.tasks), float)
        if len(weights) != len(self.tasks) or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"task weights are {list(weights)} for tasks {list(self.tasks)}")
        self._shares = weights / weights.sum()
        self._tasks = [get_task(name) for name in self.tasks]
        self._column = image_column(self.images)
        self._crop_column = image_column(self.crops) if self.crops is not None else ""
        self._cache: dict[int, np.ndarray] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def _crop_photo(self, index: int) -> np.ndarray:
        if index not in self._cache:
            self._cache[index] = np.asarray(self.crops[index][self._crop_column].convert("RGB"))  # type: ignore[index]
        return self._cache[index]

    def _photo(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self)))
        return np.asarray(self.images[int(self._order[1][index])][self._column].convert("RGB"))  # type: ignore[index]

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        seed = np.random.SeedSequence((self.seed, 0, position)).generate_state(1, np.uint64)[0] >> np.uint64(2)
        generator = torch.Generator().manual_seed(int(seed))
        rng = numpy_generator(generator)
        number = int(rng.choice(len(self._tasks), p=self._shares))
        task = self._tasks[number]
        share = 1.0 if task.name == "jpeg_restoration" else self.crop_share
        if self.crops is not None and rng.random() < share:
            photo = self._crop_photo(int(rng.integers(len(self.crops))))  # type: ignore[arg-type]
            picture = random_crop(photo, self.size, rng)
        else:
            picture = largest_square(self._photo(position), self.size, rng)
        if task.name == "colorization":
            for _ in range(20):  # a gray target would teach the model not to colorize
                if not _is_gray(picture):
                    break
                picture = largest_square(self._photo(int(rng.integers(len(self)))), self.size, rng)
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        clean = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
        given = task.degrade(clean[None], generator)
        return {
            "clean": clean,
            "condition": given.condition[0],
            "mask": torch.ones(1, *clean.shape[1:]) if given.mask is None else given.mask[0],
            "noise": torch.randn(clean.shape, generator=generator),
            "gamma": self.scheduler.sample_gamma(1, generator)[0],
            "task": torch.tensor(number),
        }


class PositionSampler(Sampler[int]):
    """Positions start, start + 1, ..., stop - 1: the order is the data set's own."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)
