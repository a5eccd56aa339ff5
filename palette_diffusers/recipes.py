"""How a picture was made, kept inside its file, so that it can be made again.

A recipe is a dict of JSON values: task, source and mask (name and SHA-256), model, dtype, seed, sample (which of
`samples`), steps, no_exif, and the task's own options. It is stored in a PNG's text chunk `palette`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .canvas import RECIPE

NEEDED = ("task", "source", "model", "dtype", "seed", "sample", "samples", "steps", "options")


def fingerprint(path: Path) -> dict[str, str]:
    """The name of a file, without its folder, and the SHA-256 of its bytes."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def read(path: Path) -> dict[str, Any]:
    """The recipe of a picture.

    Raises:
        FileNotFoundError: no such file. ValueError: no image, or none with a recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as picture:
            text = picture.info.get(RECIPE, "")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from None
    try:
        recipe = json.loads(text)
        missing = [name for name in NEEDED if name not in recipe]
    except (json.JSONDecodeError, TypeError):
        raise ValueError(f"{path} has no recipe: only a PNG that the palette command wrote has one") from None
    if missing:
        raise ValueError(f"{path} has a recipe without {', '.join(missing)}")
    return recipe


def find(entry: dict[str, str], folder: Path, named: Path | None, what: str) -> Path:
    """The file of a fingerprint: the one that is named, or that of its name in a folder.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is another file than the recipe's.
    """
    path = named or folder / Path(entry["name"]).name
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the {what} of the recipe, is not there: name it by --{what}")
    if fingerprint(path)["sha256"] != entry["sha256"]:
        raise ValueError(f"{path} is not the {what} that the picture was made from: its bytes differ")
    return path
