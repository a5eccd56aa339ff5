"""How a picture was made, kept inside its file, so that it can be made again.

A recipe is a dict of JSON values: task, source and mask (name and SHA-256), model and the hash of its weights, dtype,
seed, sample (which of `samples`), steps, no_exif, and the task's own options. It is stored in a PNG's text chunk
`palette`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .canvas import RECIPE, WORDS

OPTIONS = ("left", "right", "top", "bottom", "aspect", "consistent", "eta", "hints", "texture", "trim")
MOST = {"samples": 64, "steps": 10_000}  # of a recipe, which may be a stranger's


def fingerprint(path: Path) -> dict[str, str]:
    """The name of a file, without its folder, and the SHA-256 of its bytes."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def changed(path: Path, entry: dict[str, str], result: Path) -> bool:
    """Whether a file is not that of a fingerprint any more; one that is older than the result is not read."""
    return path.stat().st_mtime > result.stat().st_mtime and fingerprint(path)["sha256"] != entry["sha256"]


def other_weights(about: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether a network has other weights than a recipe says, as far as both are known."""
    now, then = about["weights"], recipe.get("weights")
    return None not in (now, then) and now != then


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
    except (json.JSONDecodeError, TypeError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} has no recipe: only a PNG that the palette command wrote has one")
    bad = [name for name, sound in _checks(recipe).items() if not sound]
    if bad:
        raise ValueError(f"{path} has a recipe whose {', '.join(bad)} is missing, or nothing that the command wrote")
    return recipe


def _checks(recipe: dict[str, Any]) -> dict[str, bool]:
    """Whether each part is what `palette` writes: a picture may come from anywhere."""
    get = recipe.get
    seed, steps, options, mask = get("seed"), get("steps"), get("options"), get("mask")
    number, samples = get("sample"), get("samples")
    return {
        "task": isinstance(get("task"), str),
        "source": _is_fingerprint(get("source")),
        "mask": mask is None or _is_fingerprint(mask) or (isinstance(mask, str) and bool(WORDS.fullmatch(mask))),
        "model": "model" in recipe and isinstance(get("model"), str | None),
        "weights": isinstance(get("weights"), str | None),
        "dtype": isinstance(get("dtype"), str),
        "seed": isinstance(seed, int) and -(2**63) <= seed < 2**63,
        "steps": "steps" in recipe and (steps is None or (isinstance(steps, int) and 1 <= steps <= MOST["steps"])),
        "samples": isinstance(samples, int) and 1 <= samples <= MOST["samples"],
        "sample": isinstance(number, int) and isinstance(samples, int) and 0 <= number < samples,
        "options": isinstance(options, dict)
        and set(options) <= set(OPTIONS)
        and all(
            _is_fingerprint(value) if name == "hints" else isinstance(value, int | float | None)
            for name, value in options.items()
        ),
    }


def _is_fingerprint(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "sha256"))


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
