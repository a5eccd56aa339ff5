"""Where photographs come from: folders and Hub ids => `datasets` with a column of images, and their rows => pixels."""

import glob
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import canvas

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev", "test")}  # folders of a split
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an image folder, with columns of its own
PLAIN = ("RGB", "L", "P", "1", "CMYK", "YCbCr")  # modes of 8 bits a channel at most, without alpha


class Unusable(Exception):
    """A row that no sample can be made of; the message says why."""


def load_images(path: str, split: str = "train", streaming: bool = False):
    """A folder of parquet files (SPLIT-*.parquet), of WebDataset shards (*.tar) or of images, or a Hub id => a
    `datasets.Dataset`, or an `IterableDataset` that reads as it goes.

    Of a folder of images all are taken, in whatever folders below, in the order of their names; those that are hidden
    are not. Where it holds nothing but the folders of splits (`train`, `validation` or `val`, `test`), the split's. A
    `metadata.jsonl` (or .csv, .parquet) beside the images names them and gives more columns, as `datasets` has it;
    without one, folders of one depth become the column `label`.

    Raises:
        FileNotFoundError: the folder has none of these, or there is neither such a folder nor such a Hub id.
        ValueError: no column holds images (the message lists the columns); a file that can't be read.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    folder = Path(path).expanduser()
    options: dict[str, Any] = dict(split="train", streaming=streaming)
    try:
        if folder.is_dir():
            parquet, shards = (sorted(_glob(folder, pattern)) for pattern in (f"{split}-*.parquet", "*.tar"))
            if parquet:
                data = load_dataset("parquet", data_files=parquet, **options)
            elif shards:
                data = load_dataset("webdataset", data_files={"train": shards}, **options)
            else:
                data = _image_folder(folder, split, options)
        elif folder.exists() or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{path} is no folder: expected one of parquet files, *.tar or images, or a Hub id")
        else:
            data = load_dataset(path, split=split, streaming=streaming)
        if data.features is None:  # a stream without a schema: read from its first rows
            data = data._resolve_features()
    except (tarfile.TarError, DatasetGenerationError) as error:
        raise ValueError(f"{path} has a file that can't be read: {error.__cause__ or error}") from None
    except ConnectionError as error:
        raise FileNotFoundError(f"{path} is no folder here, and can't be fetched as a Hub id: {error}") from None
    if not any(isinstance(feature, ImageFeature) for feature in data.features.values()):
        raise ValueError(f"{path} has no column of images; its columns are {', '.join(data.features)}")
    return data


def _glob(folder: Path, pattern: str) -> list[str]:
    """The files of a pattern, as `datasets` takes them: it reads names as patterns, too."""
    return [glob.escape(str(file)) for file in folder.glob(pattern)]


def _image_folder(folder: Path, split: str, options: dict[str, Any]):
    """All images of a folder. `datasets` by itself would look for splits in the files' names, and take `test-strip.jpg`
    and its like for another split."""
    from datasets import ClassLabel, Dataset, Features, load_dataset
    from datasets import Image as ImageFeature

    known = {name for names in SPLITS.values() for name in names}
    below = {entry.name: entry for entry in folder.iterdir() if not entry.name.startswith(".")}
    if below.keys() <= known and all(entry.is_dir() for entry in below.values()):
        folder = next((below[name] for name in SPLITS.get(split, (split,)) if name in below), folder)
    files: list[str] = []
    metadata: list[str] = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name in METADATA:
                metadata.append(os.path.join(place, name))
            elif name.lower().endswith(canvas.SUFFIXES) and not name.startswith("."):
                files.append(os.path.join(place, name))
    if metadata:
        return load_dataset("imagefolder", data_files={"train": list(map(glob.escape, metadata))}, **options)
    if not files:
        kinds = ", ".join(canvas.SUFFIXES)
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet, no *.tar and no images ({kinds})")
    columns: dict[str, list] = {"image": files}
    features: dict[str, Any] = {"image": ImageFeature()}
    above = [os.path.dirname(file) for file in files]
    classes = sorted({os.path.basename(name) for name in above})
    if len(classes) > 1 and len({name.count(os.sep) for name in above}) == 1:
        columns["label"] = [os.path.basename(name) for name in above]
        features["label"] = ClassLabel(names=classes)
    data = Dataset.from_dict(columns, Features(features))
    return data.to_iterable_dataset() if options["streaming"] else data


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


def split_sources(text: str) -> list[tuple[str, float]]:
    """ "PATH@WEIGHT,PATH" => the paths and their weights, 1 where none is given. The name of a folder that is there may
    have an @ of its own.

    >>> split_sources("photos@3, USER/NAME")
    [('photos', 3.0), ('USER/NAME', 1.0)]
    """
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        path, _, weight = part.rpartition("@") if "@" in part and not os.path.isdir(part) else (part, "", "1")
        try:
            sources.append((path, float(weight)))
        except ValueError:
            raise ValueError(f"{part!r} was expected to be PATH@WEIGHT, the weight a number") from None
    return sources


def load_sources(text: str, streaming: bool = False) -> tuple[list, list[float]]:
    """ "PATH@WEIGHT,PATH" => the data sets and their weights, as `split_sources` reads them."""
    sources = split_sources(text)
    return [load_images(path, streaming=streaming) for path, _ in sources], [weight for _, weight in sources]


def only_images(data):
    """The column of images alone, under the name `image`, so that data sets can be concatenated."""
    column = image_column(data)
    data = data.select_columns(column)
    return data if column == "image" else data.rename_column(column, "image")


def undecoded(data, columns: Sequence[str]):
    """The data set with the bytes of its images, not yet decoded, so that a broken one can be counted."""
    from datasets import Image as ImageFeature

    for column in columns:
        data = data.cast_column(column, ImageFeature(decode=False))
    return data


def _pixels(picture: Image.Image) -> np.ndarray:
    """As it is looked at: uint8 (H, W, 3), levels of 16 bits scaled, what is transparent on white."""
    if picture.mode in PLAIN and "transparency" not in picture.info:
        return np.asarray(picture.convert("RGB"))
    read = canvas.read(picture)
    image = read.image if read.alpha is None else read.image * read.alpha + (1 - read.alpha)
    return canvas.to_uint8(image)


def decode_photos(row: dict, columns: Sequence[str], size: int) -> list[np.ndarray]:
    """The images of a row, upright, uint8 (H, W, 3) each; a pair's may differ in size, not in shape. Levels of 16 bits
    are scaled to 8, what is transparent shows white.

    Raises:
        Unusable: one can't be decoded, or is below `size` pixels; the pictures of a pair have different shapes.
    """
    from datasets import Image as ImageFeature

    photos = []
    for column in columns:
        try:
            photos.append(_pixels(ImageFeature().decode_example(row[column])))
        except MemoryError:
            raise
        except Exception as error:  # a decoder raises whatever a damaged file makes it stumble over
            why = str(error) or type(error).__name__
            raise Unusable(f"can't be decoded: {why}{_named(why, row[column])}") from None
    names = _named("", *(row[column] for column in columns))
    shapes = [photo.shape[1] / photo.shape[0] for photo in photos]
    if max(shapes) > 1.02 * min(shapes):
        both = " and ".join(f"{photo.shape[1]}x{photo.shape[0]}" for photo in photos)
        raise Unusable(f"is a pair of different shapes: target and source are {both}{names}")
    height, width = min((photo.shape[:2] for photo in photos), key=min)
    if min(height, width) < size:
        raise Unusable(f"is {width}x{height}, below {size} pixels{names}")
    return photos


def _named(message: str, *files: Any) -> str:
    """The names of files that have some, if a message doesn't say them already."""
    names = [file["path"] for file in files if isinstance(file, dict) and file.get("path")]
    return "".join(f": {name}" for name in names if name not in message)
