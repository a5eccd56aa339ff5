"""What the demo accepts: the limits in one place, and a visitor's values checked against them, on the server."""

import base64
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from . import canvas

# the decoders that a stranger's file may reach
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
SHOWN_BY_BROWSERS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "AVIF")


class Failed(gr.Error):
    """A photo or a job that could not be done, in words for the visitor."""


@dataclass(frozen=True)
class Limits:
    """Each is set by an environment variable of its name: `PALETTE_MAX_PIXELS=4000000`."""

    max_pixels: int = 16_000_000
    max_bytes: int = 30_000_000  # of one file
    max_steps: int = 100
    max_samples: int = 4
    max_files: int = 16
    max_jobs: int = 8  # that work at the same time, sharing the network
    max_queue: int = 16  # jobs that wait
    max_seconds: int = 1800  # that work on one photo takes, all variations together
    max_visitors: int = 64  # whose page is remembered, at 4 MB each; the one who was away longest is forgotten
    keep_seconds: int = 3600  # temporary files

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """
        >>> Limits.from_environment({"PALETTE_MAX_STEPS": "20"}).max_steps
        20
        """
        values = {}
        for field in fields(cls):
            name = f"PALETTE_{field.name.upper()}"
            text = environment.get(name, str(field.default))
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name} is {text!r}, expected a whole number of at least 1")
            values[field.name] = int(text)
        return cls(**values)

    def picture(self, image: Image.Image) -> canvas.Picture:
        """An opened image => the picture, upright; too many pixels are refused before they are decoded."""
        self.check(image)
        return canvas.read(image, self.max_pixels)

    def check(self, image: Image.Image) -> None:
        """Raises:
        Failed: an opened image of too many pixels.
        """
        if image.width * image.height > self.max_pixels:
            raise Failed(
                f"This picture is {image.width}x{image.height}. "
                f"The limit is {self.max_pixels / 1e6:g} megapixels: make it smaller first."
            )


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within its bounds; what a browser or a program sent may be anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value % 1:
        raise gr.Error(f"{name} is {str(value)[:40]!r}, expected a whole number from {low} to {high}.")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise gr.Error(f"{name} is {str(value)[:40]!r}, expected a number from {low:g} to {high:g}.")
    return float(value)


def choice(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What stands under this name in a table."""
    if not isinstance(value, str) or value not in known:
        raise gr.Error(f"{name} is {str(value)[:40]!r}, expected one of: {', '.join(known)}.")
    return known[value]


def stem(payload: Any) -> str:
    """The name of an uploaded file, without its ending and whatever a file system would mind."""
    given = payload if isinstance(payload, Path) else payload.get("orig_name") or payload.get("path") or "photo"
    name = Path(str(given)).stem
    return re.sub(r"[^\w-]+", "_", name)[:60].strip("_") or "photo"


def open_upload(payload: Any, limits: Limits, what: str = "photo") -> Image.Image:
    """What Gradio received for an image, a file of the demo's own (a Path) or bytes => the opened image, not yet
    decoded.

    Raises:
        Failed: nothing came, it is too large, or no picture; the message is for the visitor and names no path.
    """
    source: Path | io.BytesIO
    url = payload.get("url") if isinstance(payload, Mapping) else None
    if isinstance(payload, Path):
        source, size = payload, payload.stat().st_size
    elif isinstance(payload, bytes):
        source, size = io.BytesIO(payload), len(payload)
    elif not isinstance(payload, Mapping):
        raise Failed(f"Choose a {what} first.")
    elif isinstance(url, str) and url.startswith("data:"):
        try:
            source = io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))
        except ValueError:  # binascii.Error is one
            raise Failed(f"The {what} is damaged: its data is no base64.") from None
        size = source.getbuffer().nbytes
    elif payload.get("path"):
        source = _uploaded(payload["path"], limits, what)
        size = source.stat().st_size
    else:
        raise Failed(f"Choose a {what} first.")
    if size > limits.max_bytes:
        raise Failed(f"This file has {size / 1e6:.0f} MB, the limit is {limits.max_bytes / 1e6:g} MB.")
    if size == 0:
        raise Failed(f"The {what} is empty.")
    try:
        return Image.open(source, formats=[name for name in FORMATS if name in _formats()])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Failed(_refusal(source, error)) from None


def _uploaded(path: Any, limits: Limits, what: str) -> Path:
    """A file that Gradio keeps for visitors: whatever else the server could read, or whether it exists, is not told."""
    try:
        file = Path(str(path)).resolve()
        if file.is_relative_to(Path(get_upload_folder()).resolve()) and file.is_file():
            return file
    except (OSError, ValueError):  # no name of a file
        pass
    kept = f"{limits.keep_seconds / 60:g} minutes"
    raise Failed(f"This {what} is not here any more (files are deleted after {kept}): choose it again.")


def _formats() -> dict[str, Any]:
    """Pillow's decoders; with pillow-heif installed, an iPhone's HEIC too."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return Image.OPEN


def _refusal(source: Path | io.BytesIO, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "This picture has far too many pixels: make it smaller first."
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(512)
    else:
        head = source.getvalue()[:512]
    if "HEIF" not in _formats() and head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "This is a HEIC photo, and this server has no decoder for it (pillow-heif): save it as JPEG first."
    if b"<svg" in head.lower():
        return "This is an SVG drawing, not a photograph: save it as PNG first."
    kinds = "JPEG, PNG, WebP, TIFF, BMP, GIF" + (", AVIF or HEIC" if "HEIF" in _formats() else " or AVIF")
    return f"This file is no picture that can be read here: use {kinds}."


class BodyLimit:
    """ASGI middleware: a request that is longer than `max_bytes` is answered with 413, and read no further."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        detail = f"The request is too large: the limit is {self.max_bytes} bytes."
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            await JSONResponse({"detail": detail}, 413)(scope, receive, send)
            return
        received = 0

        async def counted() -> Any:  # a length need not be told, nor be true
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, detail)
            return message

        await self.app(scope, counted, send)
