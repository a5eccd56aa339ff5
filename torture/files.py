"""Picture files that nobody would make: every mode, format and tag, then mutated. Hypothesis strategies."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS")
ANIMATED = ("GIF", "WEBP", "TIFF", "PNG", "AVIF")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PIXELS = 30_000_000  # of one generated picture


@dataclass(frozen=True)
class Made:
    """A file and how it came about."""

    content: bytes
    story: str

    def __repr__(self) -> str:
        return f"Made({self.story}, {len(self.content)} bytes)"


@st.composite
def sides(draw: st.DrawFn, largest: int = 5000) -> tuple[int, int]:
    """(height, width), 1 to `largest` each: mostly small."""
    top = draw(st.sampled_from([8] * 4 + [70] * 10 + [300] * 4 + [largest]))
    height, width = draw(st.integers(1, min(top, largest))), draw(st.integers(1, min(top, largest)))
    return height, min(width, PIXELS // height)


def noise(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """uint8 (H, W, C): noise, or all of one value, or a checkerboard; large ones repeat."""
    rng = np.random.default_rng(seed)
    kind = seed % 6
    h, w = min(height, 256), min(width, 256)
    if kind == 0:
        part = np.full((h, w, channels), rng.choice([0, 255, 128]), np.uint8)
    elif kind == 1:
        part = (np.indices((h, w)).sum(0)[..., None] % 2 * 255).repeat(channels, -1).astype(np.uint8)
    else:
        part = rng.integers(0, 256, (h, w, channels), np.uint8)
    return np.tile(part, (-(-height // h), -(-width // w), 1))[:height, :width]


def picture(mode: str, height: int, width: int, seed: int) -> Image.Image:
    """A picture of this mode, its values over the whole range."""
    pixels = noise(height, width, 4, seed)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray((pixels[..., 0].astype(np.float32) - 64) * [1.0, 1e-3, 1e30][seed % 3])
    if mode == "I":
        return Image.fromarray(pixels[..., 0].astype(np.int32) * [1, 257, -70000][seed % 3])
    image = Image.fromarray(pixels)
    if mode in ("LA", "La", "PA"):
        return image.convert("LA").convert(mode) if mode != "PA" else image.convert("RGB").convert("P").convert("PA")
    if mode == "RGBa":
        return image.convert("RGBa")
    if mode == "LAB":
        return Image.fromarray(pixels[..., :3].copy()).convert("RGB").convert("LAB")
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


def exif(draw: st.DrawFn) -> bytes | None:
    """Metadata: none, an orientation, lies, or as much as fits nowhere."""
    kind = draw(st.integers(0, 9))
    if kind < 4:
        return None
    if kind == 4:
        return b"Exif\0\0" + draw(st.binary(max_size=60))
    tags = Image.Exif()
    tags[0x0112] = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535]))
    if kind > 6:
        tags[0x010F] = draw(st.sampled_from(["Maker", "", "é" * 50, "x" * 70_000]))
        tags.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)
    content = tags.tobytes()
    return content[: draw(st.integers(8, len(content)))] if kind == 9 else content


def text(draw: st.DrawFn) -> PngInfo | None:
    """Text chunks of a PNG: few, many, or a bomb."""
    kind, info = draw(st.integers(0, 19)), PngInfo()
    if kind > 2:
        return None
    if kind == 0:
        info.add_itxt("palette", "[" * draw(st.sampled_from([1, 100_000])), zip=True)
    elif kind == 1:
        info.add_text("comment", " " * draw(st.sampled_from([10, 900_000, 20_000_000])), zip=True)
    else:
        for i in range(draw(st.sampled_from([3, 300]))):
            info.add_text(f"key{i}", "value" * 40)
    return info


def encoded(draw: st.DrawFn, size: tuple[int, int]) -> tuple[bytes, str]:
    """A sound file, with everything that a file can carry."""
    mode, kind, seed = draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMATS)), draw(st.integers(0, 9999))
    image, options = picture(mode, *size, seed), {}
    metadata, profile = exif(draw), draw(st.sampled_from([None, None, None, PROFILE, b"", b"junk" * 9, PROFILE[:200]]))
    if metadata is not None and kind in ("PNG", "JPEG", "WEBP"):  # Pillow 12.3's others crash by metadata that is none
        options["exif"] = metadata
    if profile is not None:
        options["icc_profile"] = profile
    frames = draw(st.integers(1, 4)) if kind in ANIMATED and max(size) < 300 and draw(st.integers(0, 3)) == 0 else 1
    if frames > 1:
        options |= {"save_all": True, "append_images": [picture("RGB", *size, seed + i) for i in range(1, frames)]}
    if kind == "PNG":
        options["pnginfo"] = text(draw)
    if kind == "JPEG":
        options |= {"quality": draw(st.integers(1, 100)), "progressive": draw(st.booleans())}
    if kind == "TIFF":
        options["compression"] = draw(st.sampled_from([None, None, "tiff_lzw", "tiff_deflate", "packbits"]))
        if options["compression"] is None:
            options["tiffinfo"] = {274: draw(st.integers(0, 9))}
    if kind == "AVIF":
        options |= {"speed": 10, "max_threads": 1}
    if kind == "GIF":
        options["transparency"] = draw(st.sampled_from([0, 7]))
    for attempt in (image, picture("RGB", *size, seed), picture("L", *size, seed)):
        for chosen in (options, {k: v for k, v in options.items() if k != "exif"}, {}):
            stream = io.BytesIO()
            try:
                attempt.save(stream, kind, **chosen)
            except Exception:  # this encoder doesn't take that: a simpler file
                continue
            return stream.getvalue(), f"{kind} {attempt.mode} {size[1]}x{size[0]} {sorted(chosen)} {frames} frames"
    stream = io.BytesIO()
    Image.new("L", size[::-1]).save(stream, "PNG")
    return stream.getvalue(), f"PNG L {size[1]}x{size[0]}"


def lie_png(content: bytes, draw: st.DrawFn) -> bytes:
    """Another IHDR, its checksum right."""
    width, height = draw(st.sampled_from([0, 1, 7, 60_000, 2**31 - 1])), draw(st.sampled_from([0, 1, 9, 60_000]))
    depth, color = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 5]))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, draw(st.integers(0, 1)))
    return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


def mutated(draw: st.DrawFn, content: bytes) -> tuple[bytes, str]:
    """One or two changes that a bad disk, a bad program or a bad person makes."""
    story = ""
    for _ in range(draw(st.integers(1, 2))):
        data, size = bytearray(content), len(content)
        kind = draw(st.sampled_from(["cut", "flip", "head", "zero", "double", "drop", "grow", "ones", "lie"]))
        at = draw(st.integers(0, max(0, size - 1)))
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            for place in draw(st.lists(st.integers(0, max(0, size - 1)), min_size=1, max_size=12)):
                if size:
                    data[place] ^= draw(st.integers(1, 255))
        elif kind == "head":
            for place in draw(st.lists(st.integers(0, 80), min_size=1, max_size=6)):
                if place < size:
                    data[place] = draw(st.integers(0, 255))
        elif kind == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif kind == "ones":
            data[at : at + 4] = b"\xff" * len(data[at : at + 4])
        elif kind == "double":
            data[at:at] = data[max(0, at - 200) : at]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 200))]
        elif kind == "grow":
            data += draw(st.binary(max_size=100))
        elif content[:4] == b"\x89PNG" and size > 33:
            data = bytearray(lie_png(content, draw))
        content, story = bytes(data), f"{story} {kind}@{at}"
    return content, story


@st.composite
def made_files(draw: st.DrawFn, largest: int = 5000, damaged: bool | None = None) -> Made:
    """A file: a third as its encoder wrote it, the rest damaged."""
    content, story = encoded(draw, draw(sides(largest)))
    if damaged if damaged is not None else draw(st.integers(0, 2)):
        content, change = mutated(draw, content)
        story += "," + change
    return Made(content, story)
