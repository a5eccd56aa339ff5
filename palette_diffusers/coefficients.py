"""What a JPEG file says about its picture: each DCT coefficient, to half a quantisation step.

Images are (B, 3, H, W), RGB, [-1, 1]; planes are Y, Cb, Cr (ITU-R BT.601, full range) in levels, -128 to 127.
"""

import math
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from .canvas import CHROMINANCE, jpeg_tables
from .color import LUMA_WEIGHTS, luma
from .masks import box_mean

BAND = 256  # rows that are projected at a time, so that memory stays bounded
ROUNDS = 3  # of projecting onto the intervals and into the gamut, in turn
SMOOTHINGS, RADIUS = 16, 4  # more and wider ones take more of the bands, and of the texture
ROWS, HALO = 1024, 2 * RADIUS * SMOOTHINGS  # that are smoothed at a time, and how far what lies beside them reaches
ROUNDING = 0.8  # levels that a coefficient may move as its pixels are rounded to 8 bits: four standard deviations
SAMPLED = 4096  # blocks that are asked for an earlier quantisation
ENOUGH = (
    100.0  # log-likelihood ratio that tells one; a flat picture or a ramp comes to 70, photographs without one to 8
)
TURNS = {  # EXIF orientation => is it transposed, and which sides are flipped then
    1: (False, ()), 2: (False, (-1,)), 3: (False, (-2, -1)), 4: (False, (-2,)),
    5: (True, ()), 6: (True, (-1,)), 7: (True, (-2, -1)), 8: (True, (-2,)),
}  # fmt: skip


def _dct_matrix() -> torch.Tensor:
    """The orthonormal DCT-II of 8 points."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
    matrix = torch.cos(math.pi * (n + 0.5) * k / 8) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _ycc_matrix() -> torch.Tensor:
    """RGB => Y, Cb, Cr (JFIF 1.02)."""
    red, green, blue = LUMA_WEIGHTS
    y = torch.tensor([red, green, blue])
    only_red, _, only_blue = torch.eye(3)
    return torch.stack([y, (only_blue - y) / (2 - 2 * blue), (only_red - y) / (2 - 2 * red)])


DCT, YCC = _dct_matrix(), _ycc_matrix()
RGB = torch.linalg.inv(YCC)


def _blocks(plane: torch.Tensor) -> torch.Tensor:
    """(B, H, W), multiples of 8 => (B, H / 8, W / 8, 8, 8)."""
    b, h, w = plane.shape
    return plane.reshape(b, h // 8, 8, w // 8, 8).transpose(2, 3)


def _joined(blocks: torch.Tensor) -> torch.Tensor:
    b, h, w = blocks.shape[:3]
    return blocks.transpose(2, 3).reshape(b, 8 * h, 8 * w)


def _mixed(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, image)


def _flip(image: torch.Tensor, dims: tuple[int, ...]) -> None:
    """In place, so that a large photograph is held once."""
    for dim in dims:
        half = image.shape[dim] // 2
        first, last = image.narrow(dim, 0, half), image.narrow(dim, image.shape[dim] - half, half)
        kept = first.flip(dim)
        first.copy_(last.flip(dim))
        last.copy_(kept)


def _smoothed(image: torch.Tensor, variance: float) -> torch.Tensor:
    """A guided filter by the picture's own luma: what varies by less than `variance` becomes its mean; squares, which
    the filter as published does not have, spare texture."""
    out = torch.empty_like(image)
    height, halo = image.shape[-2], 2 * RADIUS
    for top in range(0, height, BAND):
        first, last = max(0, top - halo), min(height, top + BAND + halo)
        here = image[..., first:last, :]
        light = luma(here)
        mean = box_mean(light, RADIUS)
        found = (box_mean(light.square(), RADIUS) - mean.square()).square()
        slope = found / (found + variance**2)
        offset = box_mean((1 - slope) * box_mean(here, RADIUS), RADIUS)
        out[..., top : top + BAND, :] = (box_mean(slope, RADIUS) * here + offset)[..., top - first :, :][..., :BAND, :]
    return out


@dataclass(frozen=True)
class Plane:
    """One plane, as far as it has whole blocks.

    steps: the quantisation table, (8, 8): how wide the interval is in which each coefficient was. levels: the quantised
    coefficients, (rows, columns, 8, 8), in units of `unit`, (8, 8), which are the steps unless the file was made of a
    coarser one. sure: whether they are known, (rows, columns): saturated pixels may hide them. scale: pixels of the
    photograph to one of the plane, 1 or 2, in each direction.
    """

    steps: torch.Tensor
    levels: torch.Tensor
    sure: torch.Tensor
    scale: int
    unit: torch.Tensor

    @staticmethod
    def decoded(pixels: torch.Tensor, steps: torch.Tensor, scale: int) -> "Plane":
        """From the decoder's (H, W), 0 to 255."""
        h, w = (side // 8 * 8 for side in pixels.shape)
        levels = torch.empty(h // 8, w // 8, 8, 8, dtype=torch.int16)
        sure = torch.empty(h // 8, w // 8, dtype=torch.bool)
        for top in range(0, h, BAND):
            blocks = _blocks(pixels[None, top : min(h, top + BAND), :w].float() - 128)
            found = (DCT @ blocks @ DCT.T / steps).round()
            error = ((DCT.T @ (found * steps) @ DCT).clamp(-128, 127) - blocks).abs().amax((-2, -1))
            rows = slice(top // 8, (top + BAND) // 8)
            levels[rows], sure[rows] = found[0].to(torch.int16), error[0] < 1.5
        return Plane(steps, levels, sure, scale, steps)

    def project(self, plane: torch.Tensor, top: int) -> torch.Tensor:
        """Rows of the plane (B, H, W), whole blocks from row `top` on => the nearest whose coefficients quantise to
        these."""
        rows, columns = plane.shape[-2] // 8, plane.shape[-1] // 8
        here = slice(top // 8, top // 8 + rows), slice(columns)
        blocks, centre = _blocks(plane), self.levels[here] * self.unit
        room = torch.maximum(self.steps / 2 - ROUNDING, self.steps / 4)
        nearest = (DCT @ blocks @ DCT.T).clamp(centre - room, centre + room)
        return _joined(torch.where(self.sure[here][..., None, None], DCT.T @ nearest @ DCT, blocks))


def earlier_quality(luma: Plane) -> int | None:
    """The quality (1 to 100, libjpeg's scale) of an earlier, coarser JPEG that this file was made of, on the same grid;
    None where it shows none.

    What was quantised before lies close to multiples of the earlier steps. The likelihood of that against coefficients
    that lie anywhere is added up over the different values of each frequency (after Fan and de Queiroz 2003), so
    that flat pictures, which have few, prove nothing.
    """
    known = luma.levels[luma.sure].reshape(-1, 64)
    known = known[:: max(1, len(known) // SAMPLED)]
    steps = luma.unit.reshape(64).numpy()
    frequency, value, weight = [], [], []
    for k in range(64):
        found, count = np.unique(known[:, k].numpy(), return_counts=True)
        frequency.append(np.full(len(found), k))
        value.append(found * steps[k])
        weight.append(np.log2(1 + count))
    at, values, weights = (np.concatenate(parts) for parts in (frequency, value, weight))
    spread = np.sqrt(steps**2 / 12 + 0.3)  # of this file's own quantisation, and of pixels of 8 bits
    best, quality = 0.0, None
    for tried, table in enumerate(jpeg_tables(), 1):
        tells = (table > 1.9 * steps) & (spread < 0.2 * table)
        if tells.sum() < 6:
            continue
        nearest = np.round(values / table[at])
        off = (values - nearest * table[at]) / spread[at]
        near = 0.95 * table[at] / (spread[at] * math.sqrt(2 * math.pi)) * np.exp(-(off**2) / 2)
        counts = weights * ((nearest != 0) & tells[at])
        evidence = float((counts * np.log(near + 0.05)).sum())
        if evidence > max(best, ENOUGH, 0.1 * counts.sum()):
            best, quality = evidence, tried
    return quality


def _of_earlier(planes: tuple[Plane, ...], quality: int) -> tuple[Plane, ...]:
    """The intervals that an earlier JPEG left. Luma is at the middle of one; chroma, which was enlarged and reduced
    again, near it."""
    tables = [torch.tensor(jpeg_tables(*table)[quality - 1]).float().reshape(8, 8) for table in ((), (CHROMINANCE,))]
    first, *others = planes
    coarse = torch.maximum(tables[0], first.steps)
    bands = first.levels.split(BAND // 8)  # so that memory stays bounded
    levels = torch.cat([(band * (first.unit / coarse)).round().to(torch.int16) for band in bands])
    held = [replace(plane, steps=torch.maximum(tables[1], plane.steps)) for plane in others]
    return replace(first, steps=coarse, unit=coarse, levels=levels), *held


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a JPEG: of luma alone where it is gray, or where chroma is subsampled otherwise than 4:2:0.

    size: (height, width) as stored. orientation: how it is turned to be upright, by EXIF. earlier: the quality of a
    coarser JPEG that the file was made of, whose coefficients these are (`earlier_quality`).
    """

    planes: tuple[Plane, ...]
    size: tuple[int, int]
    orientation: int = 1
    earlier: int | None = None

    def project(self, image: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
        """The upright photograph (B, 3, H, W) => the nearest one that the file could have been made of.

        Blocks that the right or lower border cuts stay as they are, and those whose coefficients saturation hides.

        Raises:
            ValueError: another size than the file's.
        """
        image = image.clone()
        self._project(self._stored(image), 0, rounds)
        _flip(image, TURNS[self.orientation][1])
        return image

    def smooth(self, image: torch.Tensor) -> torch.Tensor:
        """The same, as smooth as the file allows: steps between blocks and bands in a sky go, edges and texture stay.

        Smoothing where luma varies by less than the file can tell, and projecting, in turn (Zakhor 1992, with the
        guided filter of He et al. 2013).
        """
        return self.smooth_(image.clone())

    def smooth_(self, image: torch.Tensor) -> torch.Tensor:
        """`smooth`, in place."""
        half_step = self.planes[0].steps[0, 0].item() / 16 / 127.5  # of a block's mean
        stored = self._stored(image)
        above = stored[..., :0, :]
        for top in range(0, self.size[0], ROWS):
            band = torch.cat([above, stored[..., top : top + ROWS + HALO, :]], dim=-2)
            first = top - above.shape[-2]
            above = stored[..., top + ROWS - HALO : top + ROWS, :].clone()  # the next band's, as it was
            for _ in range(SMOOTHINGS):
                band = _smoothed(band, (half_step / 2) ** 2)
                self._project(band, first, rounds=1)
            self._project(band, first, ROUNDS)
            stored[..., top : top + ROWS, :] = band[..., top - first :, :][..., :ROWS, :]
        _flip(image, TURNS[self.orientation][1])
        return image

    def _stored(self, image: torch.Tensor) -> torch.Tensor:
        """The picture, turned as the file is, in place; `_flip` turns it back."""
        transposed, flipped = TURNS[self.orientation]
        size = (image.shape[-1], image.shape[-2]) if transposed else (image.shape[-2], image.shape[-1])
        if size != self.size:
            raise ValueError(f"the picture is {image.shape[-1]}x{image.shape[-2]}, its JPEG has another size")
        _flip(image, flipped)
        return image.transpose(-2, -1) if transposed else image

    def _project(self, stored: torch.Tensor, first: int, rounds: int) -> None:
        """In place; `first` is where the picture has the first of these rows, a multiple of 16."""
        for top in range(0, stored.shape[-2], BAND):
            band = stored[..., top : top + BAND, :]
            for _ in range(rounds):
                band += _mixed(RGB, self._missing(_mixed(YCC, band), first + top))
                band.clamp_(-1, 1)

    def _missing(self, ycc: torch.Tensor, top: int) -> torch.Tensor:
        """What Y, Cb and Cr (B, 3, H, W) lack to be consistent."""
        missing = torch.zeros_like(ycc)
        for i, plane in enumerate(self.planes):
            h, w = (side // (8 * plane.scale) * 8 * plane.scale for side in ycc.shape[-2:])
            if not (h and w):
                continue
            levels = F.avg_pool2d(ycc[:, i, :h, :w], plane.scale) * 127.5 - (0.5 if i == 0 else 0)
            change = (plane.project(levels, top // plane.scale) - levels) / 127.5
            missing[:, i, :h, :w] = change.repeat_interleave(plane.scale, -2).repeat_interleave(plane.scale, -1)
        return missing


def read_coefficients(path: str | os.PathLike) -> Coefficients:
    """The coefficients of a JPEG file.

    Raises:
        ValueError: no JPEG, or one of four inks or in RGB.
    """
    with Image.open(path) as file:
        if not isinstance(file, JpegImageFile):
            raise ValueError(f"{path} is no JPEG: it has no coefficients to be consistent with")
        components = file.layer  # (number, h, v, table) each
        if len(components) not in (1, 3) or file.info.get("adobe_transform") == 0:
            raise ValueError(f"{path} is a JPEG of {len(components)} inks or in RGB, expected gray or YCbCr")
        orientation = file.getexif().get(0x0112, 1)
        height, width = file.size[::-1]
        tables = [torch.tensor(file.quantization[c[3]], dtype=torch.float32).reshape(8, 8) for c in components]
    sampling = tuple(component[1:3] for component in components)
    planes = [Plane.decoded(_decode(path, 1, len(components))[0], tables[0], 1)]
    scales: dict[tuple, int] = {((1, 1),) * 3: 1, ((2, 2), (1, 1), (1, 1)): 2}
    scale = scales.get(sampling)
    if scale:
        chroma = _decode(path, scale, 3)[1:]
        planes += [Plane.decoded(pixels, table, scale) for pixels, table in zip(chroma, tables[1:], strict=True)]
    earlier = earlier_quality(planes[0])
    held = tuple(planes) if earlier is None else _of_earlier(tuple(planes), earlier)
    return Coefficients(held, (height, width), orientation if orientation in TURNS else 1, earlier)


def _decode(path: str | os.PathLike, scale: int, number: int) -> torch.Tensor:
    """The planes (C, H, W) at 1 / scale of the size: at half of it, 4:2:0 chroma is decoded as it is stored, since
    libjpeg then doubles the size of its transform instead of halving and enlarging it."""
    with Image.open(path) as file:
        if number == 3:
            file.draft("YCbCr", (max(1, file.width // scale), max(1, file.height // scale)))
        pixels = np.atleast_3d(np.array(file))
    return torch.from_numpy(pixels).permute(2, 0, 1)
