"""Where photographs come from: folders and Hub ids => `datasets` with a column of images, and their rows => pixels."""

import glob
import hashlib
import os
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import canvas

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev", "test")}  # folders of a split
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an image folder, with columns of its own
SUFFIXES = (*canvas.SUFFIXES, ".jp2", ".avif", ".gif", ".jfif", ".jpe", ".ppm", ".pgm")  # of images to train on
PLAIN = ("RGB", "L", "P", "1", "CMYK", "YCbCr")  # modes of 8 bits a channel at most, without alpha


class Unusable(Exception):
    """A row that no sample can be made of; the message says why."""


def load_images(path: str, split: str = "train", streaming: bool = False):
    """A folder of parquet files (SPLIT-*.parquet), of WebDataset shards (*.tar) or of images, or a Hub id => a
    `datasets.Dataset`, or an `IterableDataset` that reads as it goes.

    Of a folder of images all are taken (`SUFFIXES`), in whatever folders below, in the order of their names; those that
    are hidden are not. Where all lie in folders of splits (`train`, `validation` or `val`, `test`), the split's. A
    `metadata.jsonl` (or .csv, .parquet) beside the images names them and gives more columns, as `datasets` has it;
    without one, folders of one depth become the column `label`.

    Raises:
        FileNotFoundError: the folder has none of these, or there is neither such a folder nor such a Hub id.
        ValueError: no column holds images (the message lists the columns); a file that can't be read.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    folder = Path(path).expanduser()
    options: dict[str, Any] = dict(split="train", streaming=streaming)
    try:
        if folder.is_dir():
            if shards := _shards(folder, split):
                kind = "parquet" if shards[0].suffix == ".parquet" else "webdataset"
                data = load_dataset(kind, data_files={"train": [glob.escape(str(file)) for file in shards]}, **options)
            else:
                data = _image_folder(folder, split, options)
        elif folder.exists() or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{path} is no folder: expected one of parquet files, *.tar or images, or a Hub id")
        else:
            data = load_dataset(path, split=split, streaming=streaming)
        if data.features is None:  # a stream without a schema: read from its first rows
            data = data._resolve_features()
    except (tarfile.TarError, DatasetGenerationError, ArrowInvalid) as error:
        named = _broken_shard(sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else [])
        raise ValueError(f"{named or path} can't be read: {error.__cause__ or error}") from None
    except ConnectionError as error:
        raise FileNotFoundError(f"{path} is no folder here, and can't be fetched as a Hub id: {error}") from None
    if not any(isinstance(feature, ImageFeature) for feature in data.features.values()):
        raise ValueError(f"{path} has no column of images; its columns are {', '.join(data.features)}")
    return data


def _broken_shard(shards: Sequence[str]) -> str:
    """The first of the WebDataset shards that can't be read to its end; empty if there is none."""
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                tar.getmembers()
        except tarfile.TarError:
            return shard
    return ""


def _shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a folder, or WebDataset shards, in the order in which they are read: of their names as
    `datasets` takes them, which reads them as patterns."""
    found = list(folder.glob(f"{split}-*.parquet")) or list(folder.glob("*.tar"))
    return sorted(found, key=lambda file: glob.escape(str(file)))


def _image_folder(folder: Path, split: str, options: dict[str, Any]):
    """All images of a folder. `datasets` by itself would look for splits in the files' names, and take `test-strip.jpg`
    and its like for another split."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    files, metadata, others = _walk(folder)
    chosen = _split_folder(folder, [*files, *metadata], split)
    if chosen != folder:
        files, metadata = ([f for f in some if f.startswith(f"{chosen}{os.sep}")] for some in (files, metadata))
    if metadata:
        return _by_metadata(chosen, metadata, len(files), options)
    if not files:
        kinds, more = ", ".join(SUFFIXES), f"; it has {_counted(others)}" if others else ""
        below = sorted({str(file.parent) for file in folder.rglob(f"{split}-*.parquet")})
        more += f"; {below[0]} has parquet files" if below else ""
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet, no *.tar and no images ({kinds}){more}")
    columns: dict[str, list] = {"image": files}
    features: dict[str, Any] = {"image": ImageFeature()}
    above = [os.path.dirname(file) for file in files]
    classes = sorted({os.path.basename(name) for name in above})
    if len(classes) > 1 and len({name.count(os.sep) for name in above}) == 1:
        columns["label"] = [os.path.basename(name) for name in above]
        features["label"] = ClassLabel(names=classes)
    data = Dataset.from_dict(columns, Features(features))
    return data.to_iterable_dataset() if options["streaming"] else data


def _walk(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The images below a folder, in the order of their names, the metadata files, and all others. Hidden ones are none,
    nor those whose name is not UTF-8, which `datasets` can't hold; what can't be looked at is told."""
    files: list[str] = []
    metadata: list[str] = []
    others: list[str] = []
    seen = set()

    def tell(error: OSError) -> None:
        warnings.warn(f"{error.filename} is left out: {error.strerror}", stacklevel=2)

    for place, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(place, name)
            if not _utf8(path):
                warnings.warn(f"{os.fsencode(path)!r} is left out: its name is not UTF-8", stacklevel=2)
            elif name in METADATA:
                metadata.append(path)
            else:
                (files if name.lower().endswith(SUFFIXES) else others).append(path)
    return files, metadata, others


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _counted(files: list[str]) -> str:
    """ "3 .heic, 1 .txt" of so many files."""
    kinds = Counter(os.path.splitext(file)[1].lower() or "without suffix" for file in files)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))


def _split_folder(folder: Path, files: list[str], split: str) -> Path:
    """The folder of a split, if those of splits are all that hold images, which is told; else the folder itself."""
    above = {Path(file).relative_to(folder).parts[:-1][:1] for file in files}
    names = {parts[0].lower(): parts[0] for parts in above if parts}
    known = {name for names in SPLITS.values() for name in names}
    if () in above or not names.keys() <= known or len(names) < len(above):
        return folder
    for name in SPLITS.get(split, (split,)):
        if name in names and len(names) > 1:
            print(f"{folder}: of {', '.join(sorted(names.values()))} the images of {names[name]}", file=sys.stderr)
            return folder / names[name]
    return folder


def _by_metadata(folder: Path, metadata: list[str], images: int, options: dict[str, Any]) -> Any:
    """The images that metadata files name."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        escaped = list(map(glob.escape, metadata))
        data = load_dataset("imagefolder", data_files={"train": escaped}, drop_labels=True, **options)
    except ValueError as error:
        names = ", ".join(metadata)
        raise ValueError(f"{names}: {error} (a file of that name says what the images are; rename others)") from None
    columns = [name for name, feature in (data.features or {}).items() if isinstance(feature, ImageFeature)]
    if "image" in columns[1:]:  # the library gives the first of them the files that are named for `image`
        raise ValueError(f"{', '.join(metadata)}: {columns[0]}_file_name is before file_name, expected after it")
    if not options["streaming"] and len(data) < images:
        print(f"{folder}: {len(data)} rows by {', '.join(metadata)}, of {images} images", file=sys.stderr)
    return data


def would_read(folder: Path, output: Path, split: str = "train") -> bool:
    """Whether `load_images` of a folder would take pictures that are written below `output`: it is inside, and
    whatever images are there are taken."""
    inside = output.resolve().is_relative_to(folder.resolve())
    return inside and not _shards(folder, split) and not _walk(folder)[1]


def listing(folder: Path, split: str = "train") -> str:
    """A hash of the names and sizes of the files that `load_images` reads."""
    found = [str(file) for file in _shards(folder, split)]
    if not found:
        files, metadata, _ = _walk(folder)
        found = [*files, *metadata]
    text = "\n".join(f"{os.path.relpath(file, folder)} {_size(file)}" for file in found)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _size(file: str) -> int:
    """-1 of a link to nowhere, which is passed over as a broken image."""
    try:
        return os.path.getsize(file)
    except OSError:
        return -1


def image_column(data, column: str = "", source: str = "") -> str:
    """The name of the first column of images that is not `source`, or `column` once it is known to hold images.

    Raises:
        ValueError: no such column; the message lists those there.
    """
    from datasets import Image as ImageFeature

    known = [name for name, feature in data.features.items() if isinstance(feature, ImageFeature)]
    if column and column not in known:
        raise ValueError(f"column {column!r} holds no images; those that do: {', '.join(known)}")
    others = [name for name in known if name != source]
    if source and (column == source or not others):
        raise ValueError(
            f"{source!r} is the column of sources, expected the targets in another; those of images: {', '.join(known)}"
        )
    return column or others[0]


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


def pixels(picture: Image.Image) -> np.ndarray:
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
            photos.append(pixels(ImageFeature().decode_example(row[column])))
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
