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

from .canvas import CHROMINANCE, Picture, jpeg_tables
from .color import LUMA_WEIGHTS, luma
from .masks import box_mean

BAND = 256  # rows that are projected at a time, so that memory stays bounded
ROUNDS = 3  # of projecting onto the intervals and into the gamut, in turn
SMOOTHINGS, RADIUS = 16, 4  # more and wider ones take more of the bands, and of the texture
ROWS, HALO = 1024, 2 * RADIUS * SMOOTHINGS  # that are smoothed at a time, and how far what lies beside them reaches
ROUNDING = 0.8  # levels that a coefficient may move as its pixels are rounded to 8 bits: four standard deviations
SAMPLED = 4096  # blocks that are asked for an earlier quantisation
SEARCHED = 2048  # pixels of a picture that are asked where its blocks begin
ROUNDED = 0.3  # variance of a coefficient whose pixels were rounded to 8 bits, with room
FURTHER = 5  # times as far off as rounding are some, where colours out of range were cut off
HELD = 0.8  # share of the blocks that an earlier JPEG must account for: others would only be smoothed
GENERATIONS = 3  # of JPEGs that are traced back
ENOUGH = 100.0  # log-likelihood ratio that tells one; ramps come to 70, photographs without one to 8
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
# of its interval, in the middle of which a coefficient most likely was: low ones free the borders of blocks
NARROWED = (1 - 0.1 * (torch.arange(8.0)[:, None] + torch.arange(8.0))).clamp(0.35, 1)


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
    photograph to one of the plane, 1 or 2, in each direction. begin: (y, x), the pixel where its first block begins.
    """

    steps: torch.Tensor
    levels: torch.Tensor
    sure: torch.Tensor
    scale: int
    unit: torch.Tensor
    begin: tuple[int, int] = (0, 0)

    @staticmethod
    def decoded(pixels: torch.Tensor, steps: torch.Tensor, scale: int, room: float = 1.5) -> "Plane":
        """From the decoder's (H, W), 0 to 255. A block is sure if what its coefficients say is within `room` levels."""
        h, w = (side // 8 * 8 for side in pixels.shape)
        levels = torch.empty(h // 8, w // 8, 8, 8, dtype=torch.int16)
        sure = torch.empty(h // 8, w // 8, dtype=torch.bool)
        for top in range(0, h, BAND):
            blocks = _blocks(pixels[None, top : min(h, top + BAND), :w].float() - 128)
            found = (DCT @ blocks @ DCT.T / steps).round()
            error = ((DCT.T @ (found * steps) @ DCT).clamp(-128, 127) - blocks).abs().amax((-2, -1))
            rows = slice(top // 8, (top + BAND) // 8)
            levels[rows], sure[rows] = found[0].to(torch.int16), error[0] < room
        return Plane(steps, levels, sure, scale, steps)

    def project(self, plane: torch.Tensor, top: int, part: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Rows of the plane (B, H, W), whole blocks from row `top` on => the nearest whose coefficients quantise to
        these; in blocks with texture, they lie in the middle `part` of their intervals, a number or (8, 8)."""
        rows, columns = plane.shape[-2] // 8, plane.shape[-1] // 8
        here = slice(top // 8, top // 8 + rows), slice(columns)
        blocks, centre = _blocks(plane), self.levels[here] * self.unit
        texture = (centre.abs() > self.steps / 2).flatten(-2)[..., 1:].any(-1)[..., None, None]
        room = torch.maximum(self.steps / 2 - ROUNDING, self.steps / 4) * torch.where(texture, part, 1.0)
        nearest = (DCT @ blocks @ DCT.T).clamp(centre - room, centre + room)
        return _joined(torch.where(self.sure[here][..., None, None], DCT.T @ nearest @ DCT, blocks))


@dataclass(frozen=True)
class Table:
    """libjpeg's quantisation table of luma. quality: 1 to 100. turned: whether the picture was turned by 90 degrees
    since, and its rows became columns."""

    quality: int
    turned: bool = False

    @property
    def steps(self) -> torch.Tensor:
        """(8, 8)"""
        return torch.tensor(self.row).float().reshape(8, 8)

    @property
    def row(self) -> np.ndarray:
        """(64,)"""
        return STEPS[int(self.turned), self.quality - 1]


TABLES = [Table(quality, turned) for turned in (False, True) for quality in range(1, 101)]
STEPS = np.stack([jpeg_tables(), jpeg_tables().reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 64)])


def _lattice(values: np.ndarray, spread: np.ndarray, finest: np.ndarray) -> tuple[float, Table | None]:
    """The table of the JPEG whose steps coefficients (blocks, 64) lie on, each of them off by about its `spread`; of
    those coarser than `finest`. How likely that is, and None where it is not.

    The likelihood of that against coefficients that lie anywhere is added up over the different values of each
    frequency (after Fan and de Queiroz 2003), so that flat pictures, which have few, prove nothing.
    """
    frequency, value, weight = [], [], []
    for k in range(64):
        found, count = np.unique(np.round(values[:, k] * (2 / spread[k])), return_counts=True)
        frequency.append(np.full(len(found), k))
        value.append(found * (spread[k] / 2))
        weight.append(np.log2(1 + count))
    at, different, weights = (np.concatenate(parts) for parts in (frequency, value, weight))
    best, chosen = 0.0, None
    for tried in TABLES:
        table = tried.row
        tells = (table > finest) & (spread < 0.2 * table)
        if tells.sum() < 6:
            continue
        nearest = np.round(different / table[at])
        off = (different - nearest * table[at]) / spread[at]
        close = 0.7 * np.exp(-(off**2) / 2) + 0.25 / FURTHER * np.exp(-((off / FURTHER) ** 2) / 2)
        counts = weights * ((nearest != 0) & tells[at])
        likely = 0.05 + close * table[at] / (spread[at] * math.sqrt(2 * math.pi))
        evidence = float((counts * np.log(likely)).sum())
        if evidence > max(best, ENOUGH, 0.1 * counts.sum()):
            best, chosen = evidence, tried
    return best, chosen


def _earlier_table(luma: Plane) -> Table | None:
    """That of an earlier, coarser JPEG that this file was made of, on the same grid; None where it shows none: what was
    quantised before lies close to multiples of the earlier steps."""
    known = luma.sure.flatten().nonzero()[:, 0]
    known = luma.levels.reshape(-1, 64)[known[:: max(1, len(known) // SAMPLED)]]
    steps = luma.unit.reshape(64).numpy()
    return _lattice(known.numpy() * steps, np.sqrt(steps**2 / 12 + ROUNDED), 1.9 * steps)[1]


def _of_earlier(first: Plane, table: Table) -> Plane:
    """The intervals of luma that an earlier JPEG left, on the same grid."""
    coarse, room = torch.maximum(table.steps, first.steps), _room(_error(first))
    levels, sure = torch.empty_like(first.levels), first.sure.clone()
    for top in range(0, len(levels), BAND // 8):  # so that memory stays bounded
        rows = slice(top, top + BAND // 8)
        found = (first.levels[rows] * (first.unit / coarse)).round()
        off = DCT.T @ (found * coarse - first.levels[rows] * first.unit) @ DCT
        levels[rows] = found.to(torch.int16)
        sure[rows] &= off.abs().amax((-2, -1)) < room
    return replace(first, steps=coarse, unit=coarse, levels=levels, sure=sure)


def _loosened(chroma: list[Plane], quality: int) -> list[Plane]:
    """Chroma that lies near the middle of the intervals that an earlier JPEG left, enlarged and reduced since."""
    steps = torch.tensor(jpeg_tables(CHROMINANCE)[quality - 1]).float().reshape(8, 8)  # the same where it is turned
    return [replace(plane, steps=torch.maximum(steps, plane.steps)) for plane in chroma]


def _error(luma: Plane) -> float:
    """By how many levels, as a standard deviation, a JPEG's pixels are off: less than if all of its coefficients were
    off by their steps, since most are 0 and were small."""
    return 0.6 * math.sqrt(luma.unit.square().mean().item() / 12)


def _room(error: float) -> float:
    """Levels by which pixels may be off what an earlier JPEG showed, in a block that was not cut off by black or
    white."""
    return 1.5 + 6 * error


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a JPEG: of luma alone where it is gray, or where chroma is subsampled otherwise than 4:2:0.

    size: (height, width) as stored. orientation: how it is turned to be upright, by EXIF. earlier: the quality of a
    coarser JPEG that the file was made of, whose coefficients these are. gray: whether the picture is, and stays so.
    """

    planes: tuple[Plane, ...]
    size: tuple[int, int]
    orientation: int = 1
    earlier: int | None = None
    gray: bool = False

    @property
    def before(self) -> tuple[int, int]:
        """(rows, columns) that the upright photograph lacks at its top and left for a whole block to begin there."""
        transposed, flipped = TURNS[self.orientation]
        begin, size = self.planes[0].begin, self.size
        block = 16 if begin == (0, 0) else 8  # where chroma's begins is not known of a picture that was cropped
        if transposed:
            begin, size = begin[::-1], size[::-1]
        y, x = (size[k] - begin[k] if k - 2 in flipped else begin[k] for k in range(2))
        return -y % block, -x % block

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
        guided filter of He et al. 2013); in blocks with texture, high frequencies stay in the middle of their intervals
        (after Park and Lee 1999), which keeps it crisp.
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
                self._project(band, first, rounds=1, part=NARROWED)
            self._project(band, first, ROUNDS, NARROWED)
            stored[..., top : top + ROWS, :] = band[..., top - first :, :][..., :ROWS, :]
        if self.gray:  # else a rounding apart
            stored[:, 1:] = stored[:, :1]
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

    def _project(self, stored: torch.Tensor, first: int, rounds: int, part: torch.Tensor | float = 1.0) -> None:
        """In place; `first` is where the picture has the first of these rows, a multiple of 16."""
        for top in range(0, stored.shape[-2], BAND):
            band = stored[..., top : top + BAND, :]
            for _ in range(rounds):
                band += _mixed(RGB, self._missing(_mixed(YCC, band), first + top, part))
                band.clamp_(-1, 1)

    def _missing(self, ycc: torch.Tensor, top: int, part: torch.Tensor | float) -> torch.Tensor:
        """What Y, Cb and Cr (B, 3, H, W) lack to be consistent."""
        missing = torch.zeros_like(ycc)
        for i, plane in enumerate(self.planes):
            here, there = (x[:, i, plane.begin[0] :, plane.begin[1] :] for x in (ycc, missing))
            h, w = (side // (8 * plane.scale) * 8 * plane.scale for side in here.shape[-2:])
            if not (h and w):
                continue
            levels = F.avg_pool2d(here[:, :h, :w], plane.scale) * 127.5 - (0.5 if i == 0 else 0)
            change = (plane.project(levels, top // plane.scale, part) - levels) / 127.5
            there[:, :h, :w] = change.repeat_interleave(plane.scale, -2).repeat_interleave(plane.scale, -1)
        return missing


def _edges(pixels: torch.Tensor) -> list[int]:
    """The two places, of 8, where the rows of blocks most likely begin: where neighbours differ more than those beside
    them. (H, W)."""
    step = pixels.diff(dim=0).abs().mean(1)
    stands_out = step[1:-1] - (step[:-2] + step[2:]) / 2
    place = (torch.arange(len(stands_out)) + 2) % 8
    sums = torch.zeros(8).index_add_(0, place, stands_out) / torch.bincount(place, minlength=8).clamp_min(1)
    return sums.topk(2).indices.tolist()


def _off_grid(pixels: torch.Tensor, error: float) -> tuple[Table, tuple[int, int], float] | None:
    """The table of the JPEG that a picture shows, whatever it was saved as since, where its first block begins, and
    by how much the pixels (H, W), 0 to 255, are off; `error` (a standard deviation) was expected."""
    height, width = pixels.shape
    if min(height, width) < 32:
        return None
    top, left = (max(0, side - SEARCHED) // 16 * 8 for side in (height, width))
    part = pixels[top : top + SEARCHED, left : left + SEARCHED].float()
    found = []
    spread = np.full(64, math.sqrt(error**2 + ROUNDED))
    for y in _edges(part):
        for x in _edges(part.T):
            h, w = ((side - place) // 8 * 8 for side, place in zip(part.shape, (y, x), strict=True))
            blocks = _blocks(part[None, y : y + h, x : x + w])[0].flatten(0, 1)
            blocks = blocks[(blocks.amin((1, 2)) > 0) & (blocks.amax((1, 2)) < 255)]
            blocks = blocks[:: max(1, len(blocks) // SAMPLED)]
            values = (DCT @ (blocks - 128) @ DCT.T).reshape(-1, 64).numpy()
            found.append((*_lattice(values, spread, spread), (y, x), values))
    _, table, place, values = max(found, key=lambda one: one[0])
    if table is None:
        return None
    off = torch.from_numpy(np.round(values / table.row) * table.row - values).float().reshape(-1, 8, 8)
    seen = 1.4826 * (DCT.T @ off @ DCT).abs().median().item()  # those that black and white cut off count little
    return table, place, max(error, seen)


def shown_coefficients(image: torch.Tensor) -> Coefficients | None:
    """The coefficients of the JPEG that a picture (1, 3, H, W) shows, which was saved as something else since, or
    cropped; None where it shows none. Of a JPEG with libjpeg's tables, that was not resized since; chroma is near them.
    """
    height, width = image.shape[-2:]
    levels = torch.empty(height, width)
    for top in range(0, height, BAND):
        levels[top : top + BAND] = (luma(image[..., top : top + BAND, :])[0, 0] + 1) * 127.5
    found = _shown(levels, 0.0)
    if found is None:
        return None
    plane, table = found
    first, earlier = _traced(plane, levels)
    quality = (table if earlier is None else earlier).quality
    if all(torch.equal(image[:, 0], image[:, k]) for k in (1, 2)):
        return Coefficients((first,), (height, width), earlier=quality, gray=True)
    h, w = height // 16, width // 16
    chroma = [torch.empty(h, w, 8, 8, dtype=torch.int16) for _ in range(2)]
    for top in range(0, 16 * h, BAND):
        ycc = _mixed(YCC, image[..., top : min(16 * h, top + BAND), : 16 * w]) * 127.5
        blocks = DCT @ _blocks(F.avg_pool2d(ycc[0, 1:], 2)) @ DCT.T
        for one, found_here in zip(chroma, blocks, strict=True):
            one[top // 16 : (top + BAND) // 16] = found_here.round().to(torch.int16)
    ones, sure = torch.ones(8, 8), torch.ones(h, w, dtype=torch.bool)
    others = _loosened([Plane(ones, one, sure, 2, ones) for one in chroma], quality)
    return Coefficients((first, *others), (height, width), earlier=quality)


def _shown(levels: torch.Tensor, error: float) -> tuple[Plane, Table] | None:
    """The plane of the JPEG that pixels show, and its table."""
    found = _off_grid(levels, error)
    if found is None:
        return None
    table, (y, x), off = found
    plane = replace(Plane.decoded(levels[y:, x:], table.steps, 1, _room(off)), begin=(y, x))
    return (plane, table) if plane.sure.float().mean() > HELD else None


def _traced(plane: Plane, levels: torch.Tensor) -> tuple[Plane, Table | None]:
    """The plane of the coarsest JPEG that a plane of luma, whose pixels are `levels`, was made of, and its table: step
    by step, since a JPEG in between hides the first."""
    table = None
    for _ in range(GENERATIONS):
        found = []
        same = _earlier_table(plane)
        if same is not None:
            found.append((_of_earlier(plane, same), same))
        other = _shown(levels, _error(plane))
        if other is not None and other[0].begin != plane.begin:
            found.append(other)
        found = [one for one in found if one[0].steps.mean() > 1.5 * plane.steps.mean()]
        found = [one for one in found if one[0].sure.float().mean() > HELD * plane.sure.float().mean()]
        if not found:
            break
        plane, table = min(found, key=lambda one: one[1].quality)
    return plane, table


def read_coefficients(path: str | os.PathLike) -> Coefficients:
    """The coefficients of a JPEG file; of the coarser one that it was made of, where it shows that there was one
    (`earlier`): saved again at a higher quality, or cropped in between.

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
    pixels = _decode(path, 1, len(components))[0]
    planes = [Plane.decoded(pixels, tables[0], 1)]
    scales: dict[tuple, int] = {((1, 1),) * 3: 1, ((2, 2), (1, 1), (1, 1)): 2}
    scale = scales.get(sampling)
    if scale:
        chroma = _decode(path, scale, 3)[1:]
        planes += [Plane.decoded(pixels, table, scale) for pixels, table in zip(chroma, tables[1:], strict=True)]
    orientation = orientation if orientation in TURNS else 1
    first, earlier = _traced(planes[0], pixels)
    others, quality = planes[1:], None
    if earlier is not None:
        quality = earlier.quality
        others = _loosened(others, quality)
    return Coefficients((first, *others), (height, width), orientation, quality, gray=len(components) == 1)


def find_coefficients(picture: Picture) -> Coefficients | None:
    """Those of the JPEG that a picture was read from, or that it shows; None where there are none."""
    if picture.file is not None:
        try:
            return read_coefficients(picture.file)
        except (ValueError, OSError):  # it may be gone by now
            pass
    return shown_coefficients(picture.image)


def _decode(path: str | os.PathLike, scale: int, number: int) -> torch.Tensor:
    """The planes (C, H, W) at 1 / scale of the size: at half of it, 4:2:0 chroma is decoded as it is stored, since
    libjpeg then doubles the size of its transform instead of halving and enlarging it."""
    with Image.open(path) as file:
        if number == 3:
            file.draft("YCbCr", (max(1, file.width // scale), max(1, file.height // scale)))
        pixels = np.atleast_3d(np.array(file))
    return torch.from_numpy(pixels).permute(2, 0, 1)
