"""`datasets` columns => training samples. Every sample's randomness is a pure function of (seed, position).

`PaletteDataset` has random access, `PaletteStream` reads in order what need not fit on the disk.

Images are (3, H, W), RGB, [-1, 1]; masks (1, H, W), 1 = generate.
"""

import math
import mmap
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .scheduler import PaletteScheduler
from .sources import Unusable, decode_photos, image_column, undecoded
from .tasks import Given, Task, get_task, unfilled_condition

CACHE = 2**30  # bytes of decoded full-size photographs, for each worker
IN_A_ROW = 100  # unusable rows that random access may meet
KEPT = 2**31  # bytes of decoded photographs of the very size that is trained, for all workers of a training process


def _is_gray(picture: np.ndarray) -> bool:
    red, green, blue = (picture[..., k].astype(np.int16) for k in range(3))  # faster than a reduction over three
    return all(int(np.abs(a - b).max()) < 8 for a, b in ((red, green), (green, blue), (blue, red)))


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
    planes = [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pictures]
    return [p.float().div_(127.5).sub_(1)[None] for p in planes]


def _given(task: Task, pictures: list[np.ndarray], generator: torch.Generator) -> tuple[torch.Tensor, Given]:
    """The original (1, 3, H, W), and its source: the second picture of a pair, or what the task makes."""
    clean, *source = _tensors(pictures)
    return clean, task.prepare(source[0]) if source else task.degrade(clean, generator)


@dataclass
class Samples:
    """How a sample is made of a photograph, wherever that comes from.

    A sample is a dict of `clean`, `condition`, `known`, `mask` (ones where the task has none), `noise` (3, H, W),
    `gamma`, `task` (its number), and `skipped` and `gray`: how many images could not be decoded or were below the
    resolution, and how many gray ones a colorization could not use, before this one was found.

    Args:
        images: a `datasets.Dataset` with a column of images (an `IterableDataset` for a stream), or a list of
            them, drawn by `source_weights`.
        crops: full-size photographs with random access, for JPEG targets (small web images already are JPEGs on
            an aligned grid, which a model would learn to draw); `crop_share` of the other tasks' samples too.
        tasks: names, with `weights` in the same order.
        size: pixels a side.
        scheduler: draws gamma.
        seed: of everything.
        column, source_column: of the images; of the sources, if the data set has pairs.
        condition_dropout: share of samples whose source is noise (what is known of it, where there is a hole).
        holes: whether the condition has a channel for holes, which are filled a batch at once (`tasks.fill_holes`).
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
        if not self._sources:
            raise ValueError("the data set is empty")
        self._shares = self._share("task weights", self.weights, self.tasks)
        self._source_shares = self._share("source weights", self.source_weights, self._sources)
        self._tasks = [get_task(name) for name in self.tasks]
        self._columns = []
        for number, source in enumerate(self._sources):
            columns = [image_column(source, self.column, self.source_column)]
            if self.source_column:
                columns.append(image_column(source, self.source_column))
            self._columns.append(columns)
            self._sources[number] = undecoded(source, columns)
        self._crops, self._crop_columns = None, [""]
        if self.crops is not None:
            self._crop_columns = [image_column(self.crops)]
            self._crops = undecoded(self.crops, self._crop_columns)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = 0

    @staticmethod
    def _share(name: str, weights: Sequence[float] | None, what: Sequence) -> np.ndarray:
        shares = np.asarray(weights or [1.0] * len(what), float)
        if len(shares) != len(what) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"{name} are {list(shares)}, expected {len(what)} numbers of at least 0, not all 0")
        return shares / shares.sum()

    def _photos(self, position: int | None, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
        """The images of the row at a position, or of any other: target, and source if there are pairs; and how many
        rows were unusable."""
        raise NotImplementedError

    def _refused(self, name: str, why: object, before: int, too_many: bool) -> None:
        """An unusable row is an error where it is one too many, or `strict`."""
        if self.strict or too_many:
            more = "" if self.strict else f" (and {before} before it could not be used either)"
            raise ValueError(f"{name} {why}{more}")

    def _crop_photo(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A full-size photograph, and how many were unusable; the latest CACHE bytes of them stay decoded."""
        assert self._crops is not None
        skipped = 0
        while True:
            index = int(rng.integers(len(self._crops)))
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index], skipped
            try:
                (photo,) = decode_photos(self._crops[index], self._crop_columns, self.size)
            except Unusable as why:
                self._refused(f"photograph {index} of the crops", why, skipped, skipped + 1 >= IN_A_ROW)
                skipped += 1
                continue
            self._cache[index] = photo
            self._cached += photo.nbytes
            while self._cached > CACHE and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
            return photo, skipped

    def _sample(self, position: int) -> dict[str, torch.Tensor]:
        # torch's generator has 32 bits of seed, so that two of many samples would share their noise: numpy draws it
        rng = np.random.default_rng((self.seed, 0, position))
        generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
        number = int(rng.choice(len(self._tasks), p=self._shares))
        task = self._tasks[number]
        share = 1.0 if task.name == "jpeg_restoration" else self.crop_share
        skipped = gray = 0
        if self._crops is not None and not self.source_column and rng.random() < share:
            photo, skipped = self._crop_photo(rng)
            pictures = [random_crop(photo, self.size, rng)]
        else:
            photos, skipped = self._photos(position, rng)
            pictures = largest_square(photos, self.size, rng)
        if task.name == "colorization":
            while _is_gray(pictures[0]) and gray < 20:  # a gray target would teach the model not to colorize
                photos, more = self._photos(None, rng)
                pictures, gray, skipped = largest_square(photos, self.size, rng), gray + 1, skipped + more
        if rng.random() < 0.5:
            pictures = [picture[:, ::-1] for picture in pictures]
        original, given = _given(task, pictures, generator)
        clean = original[0]
        condition = unfilled_condition(given, self.holes)[0]
        if self.condition_dropout and rng.random() < self.condition_dropout:
            condition = torch.cat([torch.randn(clean.shape, generator=generator), condition[3:]])  # may be the original
        return {
            "clean": clean,
            "condition": condition,
            "known": given.known[0],
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
        rngs = [np.random.default_rng((self.seed, 2, k)) for k in range(number)]
        for k, (rng, photos) in enumerate(zip(rngs, self._fixed_photos(rngs), strict=True)):
            generator = torch.Generator().manual_seed(k)
            out.append(_given(get_task(task), largest_square(photos, self.size, rng), generator))
        return out

    def _fixed_photos(self, rngs: list[np.random.Generator]) -> list[list[np.ndarray]]:
        raise NotImplementedError


class Kept:
    """Decoded rows of a data set, `shape` of uint8 each: an anonymous shared mapping, which takes memory only as it is
    filled, and which processes that are forked later fill and read together."""

    def __init__(self, rows: int, shape: tuple[int, ...]):
        size = math.prod(shape)
        self._memory = mmap.mmap(-1, rows * (size + 1))
        values = np.frombuffer(self._memory, np.uint8)
        self._rows, self._there = values[: rows * size].reshape(rows, *shape), values[rows * size :]

    def get(self, row: int) -> list[np.ndarray] | None:
        return list(self._rows[row]) if self._there[row] else None

    def put(self, row: int, pictures: list[np.ndarray]) -> None:
        """Nothing, if one is of another size. Two processes may write the same bytes to one row."""
        if all(picture.shape == self._rows.shape[2:] for picture in pictures):
            self._rows[row] = pictures
            self._there[row] = 1


class PaletteDataset(Samples, Dataset):
    """Training samples (`Samples` says what they are and takes) by position 0, 1, 2, ... without end: resuming is
    one integer. Epoch e = position // len(images) walks its own permutation. Photographs of the very size are decoded
    once, in all workers together, where all of them take at most `KEPT` bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(source) == 0 for source in self._sources):
            raise ValueError("the data set is empty")
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        shape = (len(self._columns[0]), self.size, self.size, 3)
        fits = len(self) * (math.prod(shape) + 1) <= KEPT
        self._kept = [Kept(len(source), shape) for source in self._sources] if fits else []

    def __getstate__(self) -> dict[str, Any]:  # for workers that are not forked: each decodes for itself
        return self.__dict__ | {"_kept": []}

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self._sample(position)

    def _index(self, number: int, position: int) -> int:
        """The image of source `number` at a position: each epoch its own permutation."""
        length = len(self._sources[number])
        epoch, index = divmod(position, length)
        if self._orders.get(number, (-1,))[0] != epoch:
            seed = (self.seed, 1, epoch) if number == 0 else (self.seed, 1, epoch, number)
            self._orders[number] = (epoch, np.random.default_rng(seed).permutation(length))
        return int(self._orders[number][1][index])

    def _decoded(self, number: int, index: int) -> list[np.ndarray]:
        """As `decode_photos`, of a source's row; those that are kept are not decoded again."""
        kept = self._kept[number] if self._kept else None
        photos = kept.get(index) if kept else None
        if photos is None:
            photos = decode_photos(self._sources[number][index], self._columns[number], self.size)
            if kept:
                kept.put(index, photos)
        return photos

    def _photos(self, position: int | None, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
        position, skipped = int(rng.integers(len(self))) if position is None else position, 0
        while True:
            number = 0 if len(self._sources) == 1 else int(rng.choice(len(self._sources), p=self._source_shares))
            index = self._index(number, position)
            try:
                return self._decoded(number, index), skipped
            except Unusable as why:
                self._refused(f"image {index} of source {number}", why, skipped, skipped + 1 >= IN_A_ROW)
            skipped += 1
            position = int(rng.integers(len(self._sources[number])))

    def _fixed_photos(self, rngs: list[np.random.Generator]) -> list[list[np.ndarray]]:
        return [self._photos(None, rng)[0] for rng in rngs]


@dataclass
class PaletteStream(Samples, IterableDataset):
    """Training samples (`Samples` says what they are and takes) in the order of a stream, epoch after epoch.

    The rows are divided over the readers, the `workers` of each of `processes`: by shards where their number is a
    multiple of the readers, else each reader passes over the others' rows without decoding them. Each sample also
    has `read` (2,), the reader's epoch and how many of its rows it has read: all that a continuation needs. It
    passes over that many rows without decoding them, so that a shuffle buffer, too, is filled again as it was.

    Args:
        shuffle_buffer: rows among which the next is drawn; 0 keeps the stream's order.
        process, processes, workers: of the training run.
        batch: samples that this process takes at a time.
        begun: batches that this process took before.
        read: `read` of the last of each worker's samples, (workers, 2); None at the beginning.
    """

    shuffle_buffer: int = 0
    process: int = 0
    processes: int = 1
    workers: int = 0
    batch: int = 1
    begun: int = 0
    read: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from datasets import interleave_datasets

        if len(self._sources) > 1:
            names = ["target", "source"][: len(self._columns[0])]
            shared = [
                source.select_columns(columns).rename_columns(
                    {old: new for old, new in zip(columns, names, strict=True) if old != new}
                )
                for source, columns in zip(self._sources, self._columns, strict=True)
            ]
            mixed = interleave_datasets(
                shared, list(self._source_shares), seed=self.seed, stopping_strategy="all_exhausted"
            )
            self._sources, self._columns = [mixed], [names]
        self._stream = self._sources[0]
        self._place: list[int] = []
        self._reader: Iterator = iter(())
        if self.shuffle_buffer:
            self._stream = self._stream.shuffle(
                seed=self.seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
            )

    def _rows(self, reader: int, readers: int, epoch: int, read: int) -> Iterator[tuple[dict, int, int]]:
        """The rows of a reader from a place on: row, epoch, rows read in this epoch, this one included."""
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(deepcopy(self._stream), reader, readers)  # it remembers where it was read
        while True:
            part.set_epoch(epoch)
            number = 0
            try:
                for columns in part.iter(batch_size=32):  # a plain iteration would divide the rows over workers again
                    for values in zip(*columns.values(), strict=True):
                        number += 1
                        if number > read:
                            yield dict(zip(columns, values, strict=True)), epoch, number
            except tarfile.TarError as error:
                raise ValueError(f"a shard of the stream can't be read (tar -tf finds it): {error}") from None
            if number == 0:
                raise ValueError(f"the stream has no rows for reader {reader + 1} of {readers}")
            epoch, read = epoch + 1, 0

    def _usable(self, rows: Iterator) -> tuple[list[np.ndarray], int, list[int]]:
        """The photographs of the next row that has usable ones, how many had not, and the place after it. A stream may
        begin with thousands that are too small: only a whole epoch of them, `IN_A_ROW` or more, is an error."""
        skipped, first = 0, 0
        while True:
            row, *place = next(rows)
            first = first if skipped else place[0]
            try:
                return decode_photos(row, self._columns[0], self.size), skipped, place
            except Unusable as why:
                whole = place[0] > first + 1  # an epoch lies between, whatever its order
                self._refused(f"row {place[1] - 1} of the stream", why, skipped, whole and skipped + 1 >= IN_A_ROW)
            skipped += 1
            if skipped == IN_A_ROW:
                warnings.warn(f"{skipped} rows of the stream, up to {place[1]}, could not be used", stacklevel=1)

    def _photos(self, position: int | None, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
        photos, skipped, self._place = self._usable(self._reader)
        return photos, skipped

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info, workers = get_worker_info(), max(1, self.workers)
        own = ((info.id if info else 0) + self.begun) % workers  # a new loader begins with its first worker
        reader, readers = self.process * workers + own, self.processes * workers
        self._place = [0, 0] if self.read is None else self.read[own].tolist()
        self._reader = self._rows(reader, readers, *self._place)
        taken = len(range(own, self.begun, workers)) * self.batch
        while True:
            yield self._sample(taken * readers + reader) | {"read": torch.tensor(self._place)}
            taken += 1

    def _fixed_photos(self, rngs: list[np.random.Generator]) -> list[list[np.ndarray]]:
        rows = self._rows(0, 1, 0, 0)
        return [self._usable(rows)[0] for _ in rngs]


class PositionSampler(Sampler[int]):
    """Positions start, start + 1, ..., stop - 1: the order is the data set's own. Of several loaders that take turns,
    each has every `turns`-th batch of them, from its own `turn` on."""

    def __init__(self, start: int, stop: int, batch: int = 1, turns: int = 1, turn: int = 0):
        self.start, self.stop, self.batch, self.turns, self.turn = start, stop, batch, turns, turn

    def __iter__(self) -> Iterator[int]:
        for begin in range(self.start + self.turn * self.batch, self.stop, self.turns * self.batch):
            yield from range(begin, min(begin + self.batch, self.stop))

    def __len__(self) -> int:
        begins = range(self.start + self.turn * self.batch, self.stop, self.turns * self.batch)
        return sum(min(self.batch, self.stop - begin) for begin in begins)
