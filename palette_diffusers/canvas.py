"""Pictures in and out.  PIL image, path, URL, array or tensor => `Picture` => PIL image, array or tensor.

Tensors are (B, 3, H, W), RGB, [-1, 1]; alpha (1, 1, H, W) in [0, 1].
"""

import io
import itertools
import logging
import math
import os
import re
import secrets
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # of photographs, where a folder is searched
DEEP = ("PNG", "TIFF")  # formats that hold 16 bits
KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
}  # suffix => format of what is written
BARE = ("BMP", "JPEG2000")  # formats that Pillow writes without colour profile, date and place
FRAMED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")  # formats whose later pictures are no previews
OPAQUE = ("JPEG", "BMP")  # formats without transparency that others would see
TIFF_TAGS = (270, 271, 272, 305, 306, 315, 33432)  # of a TIFF that describe its picture, not its file
SUBFOLDERS = (0x8769, 0x8825)  # of metadata: the camera's, and the place
PRIMARIES = {  # of sRGB, for D50
    b"rXYZ": (0.4361, 0.2225, 0.0139), b"gXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7141),
}  # fmt: skip
RECIPE = "palette"  # the text chunk of a PNG that says how it was made
MAX_PIXELS = 50_000_000  # a decompression bomb is refused before it is decoded
MAX_DOWNLOAD = 200_000_000  # bytes that are fetched from a URL
MAX_EXIF = 65_533  # bytes of metadata that are carried along: what a JPEG can hold
MAX_XMP = 65_504  # bytes of it that a JPEG can hold
MAX_PROFILE = 4_000_000  # bytes of a colour profile
LINE, LINE_SEEN = 50, 16 / 127.5  # a part of a picture's side that a line is at most, and the least that it stands out
NO_PHOTOGRAPHS = ("EPS", "WMF")  # drawings, which a program of the system would be started for
WORDS = re.compile(r"alpha|#[0-9a-fA-F]{6}|[0-9]+,[0-9]+,[0-9]+,[0-9]+")  # of `mask_for`


class LossWarning(UserWarning):
    """Something of a file is not kept."""


ImageInput: TypeAlias = Image.Image | str | os.PathLike | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright. image: (1, 3, H, W); alpha: (1, 1, H, W) or None; info: what a file carries
    along (`icc_profile`, `exif`, `xmp`, `dpi`); file: where it was read from; deep: whether it is gray at 16 bits;
    quality: of a JPEG, as `jpeg_quality` finds it; hidden: where (H, W) something under full transparency was replaced
    by what continues its surroundings, and what was there, (3, number)."""

    image: torch.Tensor
    alpha: torch.Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    deep: bool = False
    quality: int | None = None
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[-2], self.image.shape[-1]


_reading: list[int] = []  # limits of those who read, in several threads
_pillows: list[int | None] = []
_lock = Lock()


@contextmanager
def _limit(pixels: int) -> Iterator[None]:
    """Pillow's own limit, which is the process's, is raised as long as somebody reads by a higher one."""
    with _lock:
        if not _reading:
            _pillows[:] = [Image.MAX_IMAGE_PIXELS]
        _reading.append(pixels)
        _set_limit()
    try:
        yield
    finally:
        with _lock:
            _reading.remove(pixels)
            _set_limit()


def _set_limit() -> None:
    Image.MAX_IMAGE_PIXELS = None if _pillows[0] is None else max([_pillows[0], *_reading])


def _open(source: str | os.PathLike) -> Image.Image:
    name = os.fspath(source)
    Image.init()
    formats = [known for known in Image.OPEN if known not in NO_PHOTOGRAPHS]
    if urlparse(str(name)).scheme in ("http", "https"):
        return Image.open(io.BytesIO(_download(str(name))), formats=formats)
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, an image file was expected")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, an image file was expected")
    return Image.open(path, formats=formats)


def _download(url: str) -> bytes:
    import requests

    with requests.get(url, timeout=30, stream=True) as response:
        response.raise_for_status()
        content = io.BytesIO()
        for part in response.iter_content(2**20):
            content.write(part)
            if content.tell() > MAX_DOWNLOAD:
                raise ValueError(f"{url} is longer than {MAX_DOWNLOAD} bytes")
    return content.getvalue()


def _upright(picture: Image.Image, name: str) -> tuple[Image.Image, bytes]:
    """Orientation applied and its tag removed; and the metadata that is left, without what is damaged or too long."""
    try:
        described = _described(picture) if picture.format == "TIFF" else None  # what is turned has none of it
        picture = ImageOps.exif_transpose(picture)
        exif = picture.getexif() if described is None else described
        content = exif.tobytes() if len(exif) else b""
    except Exception as error:  # its parser raises whatever it stumbles over, and the pixels are sound
        warnings.warn(f"{name}: damaged metadata is left out ({error})", LossWarning, stacklevel=4)
        return picture, b""
    if len(content) > MAX_EXIF:
        message = f"{name}: {len(content)} bytes of metadata are left out, {MAX_EXIF} would be kept"
        warnings.warn(message, LossWarning, stacklevel=4)
        return picture, b""
    return picture, content


def _described(picture: Image.Image) -> Image.Exif:
    """A TIFF's metadata, without the tags that say how its pixels are stored."""
    found, exif = picture.getexif(), Image.Exif()
    for tag in TIFF_TAGS:
        if tag in found:
            exif[tag] = found[tag]
    for tag in SUBFOLDERS:
        entries = found.get_ifd(tag)
        if entries:
            exif[tag] = dict(entries)
    return exif


def _tell_depth(picture: Image.Image, name: str) -> None:
    """Pillow decodes colour at 8 bits a channel in silence. Before it does.

    Raises:
        ValueError: a TIFF of 16 bits in separate planes, of which it would make noise.
    """
    if picture.mode not in ("RGB", "RGBA", "LA", "RGBX"):
        return
    tags = getattr(picture, "tag_v2", {})
    arguments = [tile[3] for tile in getattr(picture, "tile", [])]
    modes = [one if isinstance(one, str) else one[0] for one in arguments if isinstance(one, (str, tuple))]
    deep, wide = any(";16" in str(mode) for mode in modes), max(tags.get(258, (8,))) > 8
    apart = tags.get(284, 1) == 2 and tags.get(259, 1) == 1
    if wide and (apart if not modes else not deep):
        raise ValueError(f"{name} has 16 bits a channel in separate planes, expected interleaved or compressed ones")
    if deep or wide:
        message = f"{name} has 16 bits a channel: colour is read at 8, so the finer half of each level is lost"
        warnings.warn(message, LossWarning, stacklevel=5)


def _tell_frames(picture: Image.Image, name: str) -> None:
    """Of an animation, or of several pages, one is mended. Before it is decoded."""
    try:
        number = getattr(picture, "n_frames", 1) if picture.format in FRAMED else 1
    except Exception:  # closed, or a later one is damaged
        number = 1
    if number > 1:
        which = "the first" if picture.tell() == 0 else "the current one"
        warnings.warn(f"{name} has several pictures: {which} is read", LossWarning, stacklevel=5)


def _described_beside(info: dict[Any, Any], name: str) -> dict[str, Any]:
    """Of what Pillow found in a file: the description that other programs wrote (XMP: rights, captions, places), of an
    upright picture, and pixels an inch."""
    out: dict[str, Any] = {}
    xmp, dpi = info.get("xmp") or info.get("XML:com.adobe.xmp"), info.get("dpi")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    if isinstance(xmp, bytes) and len(xmp) <= MAX_EXIF:
        out["xmp"] = re.sub(rb"(tiff:Orientation\s*(?:=\s*[\"']|>\s*))[2-8]", rb"\g<1>1", xmp)
    elif xmp:
        warnings.warn(f"{name}: its XMP is left out, {MAX_EXIF} bytes would be kept", LossWarning, stacklevel=5)
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(0 < float(one) < 1e5 for one in dpi):
        out["dpi"] = tuple(float(one) for one in dpi)
    return out


def _of_inks(picture: Image.Image, profile: bytes, name: str) -> Image.Image:
    """A picture for print => sRGB, by its profile."""
    try:
        return _converted(picture, profile, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        warnings.warn(f"{name}: the colour profile can't be used and is left out ({error})", LossWarning, stacklevel=5)
        return picture


def _converted(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """From a profile to sRGB."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    assert converted is not None
    return converted


def _from_pil(picture: Image.Image, name: str, max_pixels: int) -> Picture:
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"{name} is {width}x{height}, {width * height} pixels: the limit is {max_pixels} (max_pixels)")
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width}x{height}, expected at least 1x1")
    profile = picture.info.get("icc_profile")
    known = profile and len(profile) <= MAX_PROFILE and profile[16:20] in (b"RGB ", b"GRAY")  # no inks, no Lab
    info: dict[str, Any] = {"icc_profile": profile} if known else {}
    info |= _described_beside(picture.info, name)
    _tell_depth(picture, name)
    _tell_frames(picture, name)
    picture.load()
    picture, exif = _upright(picture, name)
    if exif:
        info["exif"] = exif
    if picture.mode == "CMYK" and profile and len(profile) <= MAX_PROFILE:
        picture = _of_inks(picture, profile, name)
    alpha = None
    if picture.mode == "La":  # which Pillow converts to LA alone
        picture = picture.convert("LA")
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        levels = np.asarray(picture).astype(np.float64)
        if not np.isfinite(levels).all():
            raise ValueError(f"{name} has pixels that are not finite")
        deep = picture.mode.startswith("I;16") or levels.max() > 255
        high = 65535.0 if deep else 255.0 if levels.max() > 1 or picture.mode != "F" else 1.0
        gray = torch.from_numpy((levels / high).clip(0, 1) * 2 - 1).float()
        clear = picture.info.get("transparency")
        if isinstance(clear, int):
            alpha = torch.from_numpy(levels != clear)[None, None].float()
            if deep:
                message = f"{name} has 16 bits and transparency: it is written at 8 bits"
                warnings.warn(message, LossWarning, stacklevel=4)
        return Picture(gray.expand(1, 3, -1, -1).contiguous(), alpha, info, deep=deep and alpha is None)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = torch.from_numpy(np.asarray(picture.getchannel("A")).copy())[None, None].float() / 255
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].contiguous()
    return Picture(pixels.float().div_(127.5).sub_(1), alpha, info)  # in place: a large photograph is large here


def _from_array(array: np.ndarray) -> Picture:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"array is {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.bool_:
        values = torch.from_numpy(array.astype(np.float32))
    elif array.dtype == np.uint8:
        values = torch.from_numpy(array.astype(np.float32)) / 255
    elif array.dtype == np.uint16:
        values = torch.from_numpy(array.astype(np.float32)) / 65535
    elif np.issubdtype(array.dtype, np.floating):
        values = torch.from_numpy(array.astype(np.float32))
        _check_range(values, 0.0, "array")
    else:
        raise TypeError(f"array has dtype {array.dtype}, expected bool, uint8, uint16 or a float in [0, 1]")
    values = values.permute(2, 0, 1)[None]
    alpha = values[:, 3:] if values.shape[1] == 4 else None
    color = values[:, :3] if values.shape[1] > 1 else values.expand(-1, 3, -1, -1)
    return Picture((color * 2 - 1).contiguous(), alpha, deep=array.dtype == np.uint16 and values.shape[1] == 1)


def _check_range(values: torch.Tensor, low: float, name: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    if values.min() < low - 1e-4 or values.max() > 1 + 1e-4:
        raise ValueError(
            f"{name} has values from {values.min().item():.3g} to {values.max().item():.3g}, expected {low:g} to 1"
        )


def _from_tensor(tensor: torch.Tensor) -> Picture:
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[1] not in (1, 3) or 0 in tensor.shape:
        raise ValueError(f"tensor is {tuple(tensor.shape)}, expected (3, H, W), (1, H, W) or a batch of them")
    tensor = tensor.detach().float().cpu()
    _check_range(tensor, -1.0, "tensor")
    if tensor.min() >= 0 and tensor.max() > 0.5:
        message = "tensor has values from %.3g to %.3g, a pale picture in [-1, 1]; is it in [0, 1]? pass 2 * tensor - 1"
        logging.getLogger(__name__).warning(message, tensor.min().item(), tensor.max().item())
    return Picture(tensor.expand(-1, 3, -1, -1).contiguous())


def read(source: ImageInput, max_pixels: int = MAX_PIXELS) -> Picture:
    """PIL image (any mode), path, URL, array or tensor => `Picture`, upright.

    Arrays are (H, W[, 1, 3 or 4]), bool, uint8, uint16 or float in [0, 1]; tensors (3, H, W) in [-1, 1].

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: not an image, truncated, empty, over `max_pixels`, of the wrong rank or range, not finite.
        TypeError: another type.

    >>> read(np.zeros((4, 6), np.uint8)).size
    (4, 6)
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = str(source) if isinstance(source, (str, os.PathLike)) else "image"
    try:
        if isinstance(source, (str, os.PathLike)):
            with _limit(max_pixels), _open(source) as picture:
                file = Path(source) if Path(source).is_file() else None
                return replace(_from_pil(picture, name, max_pixels), file=file, quality=jpeg_quality(picture))
        if isinstance(source, Image.Image):
            found, quality = _from_pil(source, name, max_pixels), jpeg_quality(source)
            return replace(found, file=_still_shown(source), quality=quality)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not an image that can be read: {error}") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError, MemoryError):
        raise
    except Exception as error:  # a decoder raises whatever a damaged file makes it stumble over
        raise ValueError(f"{name} is truncated or damaged: {error}") from None
    raise TypeError(f"image is a {type(source).__name__}, expected a PIL image, path, URL, array or tensor")


def _still_shown(picture: Image.Image) -> Path | None:
    """The JPEG file that somebody opened, if nobody changed the picture since."""
    name = getattr(picture, "filename", "")
    if not isinstance(picture, JpegImageFile) or not name:
        return None
    try:
        path = Path(os.fsdecode(name))
        with Image.open(path) as again:
            same = again.size == picture.size and again.mode == picture.mode
            return path if same and np.array_equal(np.asarray(again), np.asarray(picture)) else None
    except Exception:  # it is gone, or was never a file
        return None


def read_list(sources: Any, max_pixels: int = MAX_PIXELS) -> list[Picture]:
    """One image or a list of them; a tensor (B, 3, H, W) is B images."""
    if isinstance(sources, torch.Tensor) and sources.ndim == 4:
        sources = list(sources)
    if not isinstance(sources, (list, tuple)):
        sources = [sources]
    if not sources:
        raise ValueError("the list of images is empty")
    return [read(source, max_pixels) for source in sources]


# ITU-T T.81 (JPEG), annex K: the example tables of luminance and chrominance, which libjpeg scales by its quality
LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip
CHROMINANCE = np.full((8, 8), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def jpeg_tables(table: np.ndarray = LUMINANCE) -> np.ndarray:
    """The quantisation tables of libjpeg's qualities 1 to 100, (100, 64), row by row."""
    qualities = np.arange(1, 101)
    scale = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    return ((table.reshape(64) * scale[:, None] + 50) // 100).clip(1, 255)


def jpeg_quality(picture: Image.Image) -> int | None:
    """The quality (1 to 100, libjpeg's scale) that an opened JPEG was saved with, the nearest one where it was made
    by other tables; None where it is no JPEG.

    >>> file = io.BytesIO()
    >>> Image.new("L", (8, 8)).save(file, "JPEG", quality=23)
    >>> jpeg_quality(Image.open(file))
    23
    """
    tables = getattr(picture, "quantization", None)
    if picture.format not in ("JPEG", "MPO") or not tables:
        return None
    errors = np.abs(jpeg_tables() - np.array(tables[min(tables)])).sum(1)
    return int(errors.argmin()) + 1


def read_mask(source: ImageInput, size: tuple[int, int]) -> torch.Tensor:
    """A mask, white = generate => (1, 1, H, W) of 0 and 1, the size of its picture. What is transparent is not white.

    Raises:
        ValueError: another size than the picture, or nothing to generate, or nothing to keep.
    """
    if isinstance(source, torch.Tensor):
        tensor = source.detach().float().cpu()
        tensor = tensor[None] if tensor.ndim == 3 else tensor[None, None] if tensor.ndim == 2 else tensor
        if tensor.ndim != 4 or tensor.shape[:2] != (1, 1):
            raise ValueError(f"mask is {tuple(source.shape)}, expected (H, W), (1, H, W) or (1, 1, H, W)")
        _check_range(tensor, 0.0, "mask")
        mask = (tensor > 0.5).float()
    else:
        picture = read(source, max(MAX_PIXELS, size[0] * size[1]))  # as large as its picture was allowed to be
        mask = (picture.image.mean(1, keepdim=True) > 0).float()
        mask = mask if picture.alpha is None else mask * (picture.alpha > 0.5)
    if tuple(mask.shape[-2:]) != tuple(size):
        raise ValueError(
            f"mask is {mask.shape[-1]}x{mask.shape[-2]}, the image {size[1]}x{size[0]}: they must have the same size"
        )
    if not mask.any():
        raise ValueError("the mask is empty: nothing is white, so there is nothing to generate")
    if mask.all():
        raise ValueError("the mask is full: everything is white, so there is nothing to go by")
    return mask


def plain_word(word: str) -> str:
    """A word for `mask_for` as people write it => as it is known; anything else as it is.

    >>> plain_word("#f00"), plain_word("1, 2, 3, 4"), plain_word("my mask.png")
    ('#ff0000', '1,2,3,4', 'my mask.png')
    """
    if re.fullmatch("#[0-9a-fA-F]{3}", word):
        return "#" + "".join(2 * digit for digit in word[1:])
    return word.replace(" ", "") if WORDS.fullmatch(word.replace(" ", "")) else word


def mask_for(source: ImageInput, picture: Picture) -> torch.Tensor:
    """A mask, or a word for where the hole is => (1, 1, H, W), 1 = generate.

    "alpha": where the picture is more transparent than not; "#RRGGBB": pixels painted in this colour;
    "LEFT,TOP,RIGHT,BOTTOM": a box, in pixels from the left upper corner. Anything else: as `read_mask`.

    Raises:
        ValueError: a hole that is empty, that is everything, or a box outside the picture.
    """
    if not isinstance(source, str):
        return read_mask(source, picture.size)
    height, width = picture.size
    source = plain_word(source)
    if source == "alpha":
        if picture.alpha is None:
            raise ValueError("the mask is alpha, but the picture has no transparency")
        return read_mask((picture.alpha < 0.5).float(), picture.size)
    if source.startswith("#") and WORDS.fullmatch(source):
        color = torch.tensor([int(source[k : k + 2], 16) for k in (1, 3, 5)])
        painted = torch.from_numpy(to_uint8(picture.image)) == color
        return read_mask(painted.all(-1).float(), picture.size)
    if "," in source and WORDS.fullmatch(source):
        left, top, right, bottom = map(int, source.split(","))
        if not (left < right <= width and top < bottom <= height):
            raise ValueError(f"the box is {source}, expected LEFT,TOP,RIGHT,BOTTOM of a box within {width}x{height}")
        mask = torch.zeros(1, 1, height, width)
        mask[..., top:bottom, left:right] = 1
        return read_mask(mask, picture.size)
    return read_mask(source, picture.size)


def with_mask(picture: Picture, source: ImageInput) -> tuple[Picture, torch.Tensor]:
    """A picture and its mask (`mask_for`); a hole that is told by transparency is opaque once it is filled."""
    mask = mask_for(source, picture)
    return (replace(picture, alpha=None) if isinstance(source, str) and source == "alpha" else picture), mask


def line_at(image: torch.Tensor, side: str) -> int:
    """How many pixels wide a line is that a picture (1, 3, H, W) has along its top, bottom, left or right, as the edges
    of scans are; 0 where there is none, or where it is wider than a 50th of the picture."""
    upright = image[0] if side in ("top", "bottom") else image[0].transpose(1, 2)
    depth, length = upright.shape[1:]
    most = depth // LINE
    if not most:
        return 0
    near, first = min(depth, 2 * most + 3), side in ("top", "left")
    rows = upright.narrow(1, 0 if first else depth - near, near)[..., :: max(1, length // 4096)].mean(0)
    rows = rows if first else rows.flip(0)
    behind = rows[most : most + 3].mean(0)
    share = torch.tensor([0.5, 0.9])  # of a line's length; the rest of a slanted one is deeper
    usual = (rows[2 * most : 2 * most + 3].mean(0) - behind).abs().quantile(share)
    off = (rows[: most + 1] - behind).abs().quantile(share, dim=1) / (3 * usual).clamp_min(LINE_SEEN)[:, None]
    ends = torch.nonzero(off[0] < 0.5)[:, 0].tolist()
    if off[0, 0] < 1 or not ends:
        return 0
    return next((depth for depth in range(ends[0], most + 1) if off[1, depth] < 1), ends[0])


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) in [-1, 1] => (H, W, 3) uint8; the inverse of reading, to the bit."""
    pixels = torch.empty(*image.shape[-2:], 3, dtype=torch.uint8)
    for band, out in zip(image[0].split(256, dim=-2), pixels.split(256), strict=True):  # memory stays bounded
        out[:] = (band.float() + 1).mul_(127.5).round_().clamp_(0, 255).byte().permute(1, 2, 0)
    return pixels.numpy()


def to_pil(image: torch.Tensor, picture: Picture | None = None) -> Image.Image:
    """(1, 3, H, W) => PIL image, RGB or RGBA, with the alpha and metadata of `picture`; I;16 where that was gray at 16
    bits and the image is gray, to the bit."""
    info = {} if picture is None else picture.info
    if picture is not None and picture.deep and torch.equal(image[:, 0], image[:, 1]):
        levels = (image[0, 0].double() + 1).mul_(32767.5).round_().clamp_(0, 65535)
        out = Image.fromarray(levels.cpu().numpy().astype(np.uint16))
    else:
        pixels = to_uint8(image)
        if picture is not None and picture.alpha is not None:
            alpha = (picture.alpha[0, 0] * 255).round().byte().numpy()
            pixels = np.concatenate([pixels, alpha[..., None]], axis=-1)
        out = Image.fromarray(pixels)
    out.info.update(info)
    if "exif" in info:
        out.info["exif"] = _of_size(info["exif"], out.size)
    return with_profile(out)


def _of_size(content: bytes, size: tuple[int, int]) -> bytes:
    """Metadata whose width and height, if it tells them, are these."""
    exif = Image.Exif()
    exif.load(content)
    camera = exif.get_ifd(ExifTags.IFD.Exif)
    told = dict(zip((ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight), size, strict=True))
    if all(camera.get(tag, value) == value for tag, value in told.items()):
        return content
    camera.update({tag: value for tag, value in told.items() if tag in camera})
    return exif.tobytes()


def with_profile(image: Image.Image) -> Image.Image:
    """An RGB picture whose profile is of gray gets one of RGB with the same curve, so that its levels stay and look the
    same; a gray one loses a profile of RGB. In place."""
    profile = image.info.get("icc_profile")
    gray = image.mode in ("L", "LA") or image.mode.startswith("I")
    if not profile or profile[16:20] == (b"GRAY" if gray else b"RGB "):
        return image
    made = None if gray or profile[16:20] != b"GRAY" else rgb_profile(profile)
    if made is None:
        del image.info["icc_profile"]
        warnings.warn("the colour profile is left out: it does not fit the picture", LossWarning, stacklevel=4)
    else:
        image.info["icc_profile"] = made
    return image


def rgb_profile(profile: bytes) -> bytes | None:
    """An ICC profile of gray => one of RGB (sRGB's primaries) with the same curve, in which R = G = B is that gray.
    None where it has no such curve.

    Source: ICC.1:2022, 7 and 8.3 to 8.4.
    """
    count = min(100, int.from_bytes(profile[128:132], "big"), (len(profile) - 132) // 12)  # it may be a stranger's
    entries = [struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count)]
    places = {name: (start, start + size) for name, start, size in entries}
    tags = {name: profile[slice(*places[name])] for name in (b"desc", b"cprt", b"wtpt", b"kTRC") if name in places}
    curve = tags.pop(b"kTRC", b"")
    if not curve or profile[20:24] != b"XYZ ":
        return None
    for name, values in PRIMARIES.items():
        tags[name] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    start = 132 + 12 * len(tags)
    table, data, starts = struct.pack(">I", len(tags)), b"", {}
    for name, content in tags.items():
        if content not in starts:  # the three curves are one
            starts[content] = start + len(data)
            data += content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, starts[content], len(content))
    header = struct.pack(">I", start + len(data)) + profile[4:12] + b"mntrRGB XYZ " + profile[24:84] + bytes(44)
    return header + table + data


def to_rgb(image: Image.Image) -> Image.Image:
    """At 8 bits; Pillow's own conversion cuts off what is above 255 in 16 bits.

    >>> to_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0))
    (128, 128, 128)
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def kind_of(path: Path) -> str:
    """The format that a picture of this name is written in.

    Raises:
        ValueError: a suffix that is not among `KINDS`. FileNotFoundError: its folder is not there.
    """
    kind = KINDS.get(path.suffix.lower())
    Image.init()
    if kind not in Image.SAVE:
        raise ValueError(f"{path.name}: unknown suffix {path.suffix!r}, expected one of {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: the picture can't be written there")
    return kind


def save(image: Image.Image, path: str | os.PathLike, **settings: Any) -> None:
    """Writes beside and renames, so that no half-written file stays behind; the suffix gives the format. Further
    `settings` are those of Pillow's writer.

    Raises:
        ValueError: an unknown suffix. OSError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in OPAQUE and image.mode in ("RGBA", "LA") and np.asarray(image.getchannel("A")).min() < 255:
        warnings.warn(f"{path.name}: transparency is left out, a {kind} has none", LossWarning, stacklevel=2)
    if kind in OPAQUE or (image.mode == "I;16" and kind not in DEEP):
        image, metadata = to_rgb(image), image.info
        image.info.update(metadata)
        with_profile(image)
    if kind in BARE and image.info.get("icc_profile"):
        image = _to_srgb(image, path.name)
    kept = [] if kind in BARE else ["icc_profile", "exif"] + ["xmp"] * (kind in ("JPEG", "WEBP", "AVIF"))
    lost = {"exif", "xmp"} & image.info.keys() - {*kept, *(["xmp"] if kind in ("PNG", "TIFF") else [])}
    if lost:
        message = f"{path.name}: date, place, camera and rights are left out, a {kind} has none"
        warnings.warn(message, LossWarning, stacklevel=2)
    if kind == "JPEG" and len(image.info.get("xmp", b"")) > MAX_XMP:
        kept.remove("xmp")
        message = f"{path.name}: its XMP is left out, a JPEG holds {MAX_XMP} bytes"
        warnings.warn(message, LossWarning, stacklevel=2)
    kept += ["dpi"] * (kind in ("PNG", "JPEG", "TIFF"))
    options: dict[str, Any] = {k: image.info[k] for k in kept if k in image.info}
    if kind == "JPEG":
        options |= {"quality": 95, "subsampling": "4:4:4"}
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    if kind == "AVIF":
        options |= {"quality": 95, "subsampling": "4:4:4"}
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        if RECIPE in image.info:
            options["pnginfo"].add_text(RECIPE, image.info[RECIPE])
        if "xmp" in image.info:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", image.info["xmp"].decode(errors="replace"))
    if kind == "TIFF" and "xmp" in image.info:
        exif = Image.Exif()
        exif.load(options.get("exif") or b"")
        exif[700] = image.info["xmp"]
        options["exif"] = exif
    part = path.with_name(f"{part_name(path)}{secrets.token_hex(4)}.part")
    with open(part, "xb") as stream:  # of the rights that new files have
        try:
            image.save(stream, kind, **options, **settings)
            stream.close()
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    """For a format without colour profiles: the same colours by those that everybody assumes."""
    metadata = {key: value for key, value in image.info.items() if key != "icc_profile"}
    try:
        converted = _converted(image, image.info["icc_profile"], image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        message = f"{name}: the colour profile is left out, this format has none ({error})"
        warnings.warn(message, LossWarning, stacklevel=3)
        converted = image.copy()
    converted.info.clear()
    converted.info.update(metadata)
    return converted


def part_name(path: Path) -> str:
    """What the name of a half-written file begins with: as much of its own as a name may be long (255 bytes)."""
    name = path.name
    while len(os.fsencode(name)) > 255 - len("...part") - 8:
        name = name[:-1]
    return f".{name}."


def diversity(images: list[Image.Image]) -> float:
    """The mean absolute difference of two pictures of one size, over all pairs of at least two, 0 to 255."""
    (width, height), total = images[0].size, 0
    for top in range(0, height, 256):  # bands of rows, so that memory stays bounded
        box = (0, top, width, min(height, top + 256))
        bands = [np.asarray(to_rgb(image.crop(box))).astype(np.int16) for image in images]
        total += sum(int(np.abs(a - b).sum(dtype=np.int64)) for a, b in itertools.combinations(bands, 2))
    return total / math.comb(len(images), 2) / (3 * width * height)


def sheet(images: list[Image.Image], side: int = 320, gap: int = 8) -> Image.Image:
    """A contact sheet: the pictures in rows, none longer than `side` pixels.

    >>> sheet([Image.new("RGB", (640, 320))] * 3).size
    (664, 344)
    """
    small = []
    for image in images:
        small.append(to_rgb(image))
        small[-1].thumbnail((side, side), Image.Resampling.LANCZOS)
    columns = math.ceil(math.sqrt(len(small)))
    width, height = (max(image.size[k] for image in small) + gap for k in (0, 1))
    rows = math.ceil(len(small) / columns)
    out = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(small):
        out.paste(image, (gap + i % columns * width, gap + i // columns * height))
    return out
