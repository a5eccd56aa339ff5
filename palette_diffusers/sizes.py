"""Photographs of any size. The model's resolution is where it thinks, not a limit on the picture.

Each strategy maps a photograph to what the model works on, and its samples back.
Images are (B, 3, H, W), RGB, [-1, 1]; masks (1, 1, H, W), 1 = generate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .color import luma, with_luma
from .machine import memory_full
from .masks import box_mean

MOST_HOLES, PART = 32, 2500  # that are sampled one by one; pixels a side that are sampled together if they are more
BLOCK, LAP = 1472, 48  # pixels a side that are sampled at a time, so that memory stays bounded; how far they overlap
TILES = 16  # of a large photograph that are evaluated at once, where they have 64 pixels a side
CELL = 64  # pixels a side of noise that has one seed

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class View:
    """A rectangle of the photograph, as the model sees it: cropped, scaled, and padded by reflection.

    top, left, height, width: of the crop, in the photograph's pixels. inner: (height, width) after scaling.
    outer: after padding to a multiple that the network takes.
    """

    top: int
    left: int
    height: int
    width: int
    inner: tuple[int, int]
    outer: tuple[int, int]

    def look(self, image: torch.Tensor) -> torch.Tensor:
        """The photograph (B, C, H, W) => (B, C, *outer)."""
        return pad_to(resize(self.crop(image), self.inner).clamp(-1, 1), self.outer)

    def look_known(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The photograph and its hole => both as the model sees them, (B, C, *outer) and (B, 1, *outer).

        A small pixel is known if at least half of what lies under it is, so that thin scratches don't hide the
        picture; its colour is a mean of known pixels alone, so that nothing of what lies in the hole leaks out.
        """
        image, mask = self.crop(image), self.crop(mask)
        hole = (F.adaptive_avg_pool2d(mask, self.inner) > 0.5).to(mask)
        if self.inner == (self.height, self.width):
            small = image * (1 - mask)
        else:
            size: Any = dict(size=self.inner, mode="bilinear", antialias=True, align_corners=False)
            weight = (1 - F.interpolate(mask, **size)).clamp_min_(1e-6)
            small = image.new_empty(*image.shape[:2], *self.inner)
            for i in range(small.shape[1]):  # channels one by one, so that less is held
                known = torch.where(mask > 0, 0.0, image[:, i : i + 1])
                small[:, i : i + 1] = F.interpolate(known, **size).div_(weight)
        small = torch.where(hole > 0, 0.0, small)
        return pad_to(small.clamp_(-1, 1), self.outer), pad_to(hole, self.outer)

    def back(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *outer) => the rectangle's size (B, C, height, width)."""
        return resize(image[..., : self.inner[0], : self.inner[1]], (self.height, self.width))

    def crop(self, image: torch.Tensor) -> torch.Tensor:
        """The photograph (B, C, H, W) => the rectangle at its own resolution, (B, C, height, width)."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def levels(self, multiple: int) -> list["View"]:
        """From this view to the rectangle's own resolution, each about twice as fine as the one before."""
        views = [self]
        size = (self.height, self.width)
        while views[-1].inner != size:
            inner = tuple(min(full, 2 * side) for full, side in zip(size, views[-1].inner, strict=True))
            if max(f / i for f, i in zip(size, inner, strict=True)) < 1.3:  # a last step too small to be worth it
                inner = size
            outer = tuple(_up(side, multiple) for side in inner)
            views.append(replace(self, inner=inner, outer=outer))  # type: ignore[arg-type]
        return views


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """To (height, width), antialiased on the way down; bicubic overshoots, so clamp what must stay in range."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)


def pad_to(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Reflects the picture on the right and below, to (height, width), as often as it takes."""
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    rows = torch.arange(size[0], device=image.device) % max(1, 2 * height - 2)
    columns = torch.arange(size[1], device=image.device) % max(1, 2 * width - 2)
    rows, columns = torch.minimum(rows, 2 * height - 2 - rows), torch.minimum(columns, 2 * width - 2 - columns)
    return image[..., rows.clamp(0, height - 1), :][..., columns.clamp(0, width - 1)]


def _up(value: float, multiple: int) -> int:
    """The next multiple, from the second on: where the network's smallest level is one pixel wide, oneDNN's bfloat16
    convolutions of stride 2 return what happened to lie in memory (seen with AMX, torch 2.13)."""
    return max(2 * multiple, math.ceil(value / multiple) * multiple)


def fit(height: int, width: int, native: int, multiple: int, top: int = 0, left: int = 0) -> View:
    """A view of a whole rectangle with about native x native pixels, its aspect ratio kept (up to 3:1).

    >>> fit(3000, 4000, 64, 8).inner
    (55, 74)
    """
    scale = native / math.sqrt(height * width)
    # a long strip keeps some height, up to sixteen times the work
    scale = max(scale, min(native / 2 / min(height, width), 4 * scale))
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    if all(0.7 < side / native < 1.4 for side in (height, width)):  # near enough to be seen as it is
        inner = (height, width)
    return View(top, left, height, width, inner, (_up(inner[0], multiple), _up(inner[1], multiple)))


def hole_view(mask: torch.Tensor, native: int, multiple: int) -> View:
    """A view around the hole (1, 1, H, W), with context, in which the hole takes at most about half the side."""
    height, width = mask.shape[-2:]
    rows = torch.nonzero(mask[0, 0].amax(1)).flatten()
    columns = torch.nonzero(mask[0, 0].amax(0)).flatten()
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    side = max(native, round(1.8 * max(bottom - top, right - left)))
    crop_height, crop_width = min(height, side), min(width, side)
    top = min(max(0, (top + bottom - crop_height) // 2), height - crop_height)
    left = min(max(0, (left + right - crop_width) // 2), width - crop_width)
    return fit(crop_height, crop_width, native, multiple, top, left)


def separate(mask: torch.Tensor, grid: int = 128) -> Iterator[torch.Tensor]:
    """The holes of a mask (1, 1, H, W) that lie apart, each a mask, so that each gets a view of its own.

    Holes that touch on a grid of at most `grid` cells a side stay together. Where they would be more than `MOST_HOLES`,
    as specks of dust are, so do those that touch on a coarser one, or, in a photograph whose whole is more than memory
    should hold at once, those of the same part of it, of about `PART` pixels a side. Sizes fall; together they are the
    mask. Each is made when it is its turn, since each is as large as the photograph; those that have been may be taken
    out of the mask meanwhile.
    """
    size = tuple(mask.shape[-2:])
    cells = F.adaptive_max_pool2d(mask, tuple(min(side, grid) for side in size))
    numbers = torch.arange(1, cells.numel() + 1, dtype=torch.float32).reshape(cells.shape)
    labels = numbers * cells
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * cells
        if torch.equal(spread, labels):
            break
        labels = spread
    found = labels.unique()
    if len(found) <= 2:
        yield mask
        return
    if len(found) > MOST_HOLES + 1:
        parts, (down, across) = max(size) // PART, labels.shape[-2:]
        if parts < 2:
            yield from separate(mask, grid // 2)
            return
        cell = labels.long() - 1  # one of the hole's
        labels = (cell // across * parts // down * parts + cell % across * parts // across + 1) * cells
        found = labels.unique()
    # by whole numbers: interpolation rounds, and would leave pixels out
    rows, columns = (torch.arange(n) * c // n for n, c in zip(size, labels.shape[-2:], strict=True))
    counts = torch.zeros(labels.shape[-2], size[1]).index_add_(0, rows, mask[0, 0])
    counts = torch.zeros(labels.shape[-2:]).index_add_(1, columns, counts)

    def hole(label: torch.Tensor) -> torch.Tensor:
        own = labels[0, 0] == label
        down, across = torch.nonzero(own.any(1)[rows]).flatten(), torch.nonzero(own.any(0)[columns]).flatten()
        inside = (..., slice(int(down[0]), int(down[-1]) + 1), slice(int(across[0]), int(across[-1]) + 1))
        out = torch.from_numpy(np.zeros(mask.shape, np.float32))  # NumPy's takes no memory where nothing is written
        out[inside] = mask[inside] * own[rows[inside[1]]][:, columns[inside[2]]]
        return out

    yield from map(hole, sorted(found[found > 0], key=lambda label: -counts[labels[0, 0] == label].sum().item()))


def without_grid(image: torch.Tensor, hole: torch.Tensor, radius: int = 8) -> torch.Tensor:
    """Takes out of a hole (1, 1, H, W) of an image (B, 3, H, W) what alternates from one pixel to the next over squares
    of 2 radius + 1 pixels: the pattern that a network of 2x2 patches leaves. Finer than that, detail does not do so."""
    rows, columns = (torch.ones(n).to(image) for n in image.shape[-2:])
    rows[1::2], columns[1::2] = -1, -1
    share = box_mean(hole, radius).clamp_min(1e-3)
    out = image.clone()
    for one in out.split(1):  # in place, so that memory is that of one
        for sign, dims in ((rows[:, None], (-2,)), (columns, (-1,)), (rows[:, None] * columns, (-2, -1))):
            detail = one
            for dim in dims:
                detail = detail - _binomial(detail, dim)
            one -= hole * sign * (box_mean(sign * detail * hole, radius) / share)
    return out


def _binomial(image: torch.Tensor, dim: int) -> torch.Tensor:
    """(1, 2, 1) / 4 along a dimension, the border repeated; nothing is left of what alternates."""
    size = image.shape[dim]
    before, after = (torch.arange(size).add(step).clamp(0, size - 1).to(image.device) for step in (-1, 1))
    return (image.index_select(dim, before) + 2 * image + image.index_select(dim, after)) / 4


def grain(image: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a photograph's grain (B, 3, H, W) where `where` (1, 1, H, W) is 1: (B, 1, 1, 1).

    It is that of luma's finest detail in the calmest fifth of all 8x8 cells, where there is nothing but grain; 0
    where no cells lie within. Pixels beside others are left out, so that these have no part in it.
    """
    found = [image.new_zeros(len(image), 0)]
    height, width = where.shape[-2:]
    for top in range(0, height - 7 if width > 7 else 0, 512):  # in bands, so that memory stays bounded
        first, last = max(0, top - 1), min(height, top + 513)
        light = luma(image[..., first:last, :])
        detail = (light - box_mean(light, 1)).square()[..., top - first :, :][..., :512, :]
        inside = -F.max_pool2d(-where[..., first:last, :], 3, 1, 1)[..., top - first :, :][..., :512, :]
        found.append(F.avg_pool2d(detail * inside, 8)[:, 0, F.avg_pool2d(inside, 8)[0, 0] > 0.9])
    cells = torch.cat(found, dim=1)
    if not cells.shape[1]:
        return image.new_zeros(len(image), 1, 1, 1)
    calm = cells.quantile(0.2, dim=1)
    return (calm * 9 / 8).sqrt()[:, None, None, None]  # a mean of nine has taken a ninth of its variance


def rings(mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """A border (1, 1, H, W) around a known rectangle => what is filled after what, each a mask, so that none reaches
    further than half the rectangle's short side; sides of a ring that lie apart are filled one after another.

    Together they are the border. The paper makes its panoramas so, too (section 4.5).
    """
    for ring, _ in strips(mask, max(mask.shape)):
        yield from separate(ring)


def strips(mask: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, tuple[Any, ...]]]:
    """A border (1, 1, H, W) around a known rectangle, from the inside out in rings of at most `width` pixels, or half
    the rectangle's short side: each a mask, and the part (index) of the picture that it and what is within it take."""
    height, across = mask.shape[-2:]
    rows, columns = (torch.nonzero((1 - mask[0, 0]).amax(dim)).flatten() for dim in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    step = max(1, min(width, min(bottom - top, right - left) // 2))
    before = mask == 0
    while not bool(before.all()):
        top, bottom = max(0, top - step), min(height, bottom + step)
        left, right = max(0, left - step), min(across, right + step)
        now = torch.zeros_like(before)
        now[..., top:bottom, left:right] = True
        yield (now & ~before).to(mask), (..., slice(top, bottom), slice(left, right))
        before = now


class NothingToExtend(ValueError):
    """The picture has the aspect already."""


def sides_for(size: tuple[int, int], aspect: float) -> dict[str, int]:
    """(height, width) => pixels to add at each side, so that width / height becomes `aspect`, to the nearest pixel.

    Raises:
        ValueError: an aspect that is not above 0. NothingToExtend: one that the picture has already.

    >>> sides_for((100, 101), 2.0)
    {'left': 49, 'right': 50, 'top': 0, 'bottom': 0}
    """
    if not 1e-6 < aspect < 1e6:
        raise ValueError(f"aspect is {aspect}, expected width / height above 0, such as 1.78")
    height, width = size
    across, down = max(0, round(height * aspect) - width), max(0, round(width / aspect) - height)
    if not (across or down):
        raise NothingToExtend(
            f"the picture is {width}x{height}, which is aspect {aspect:.4g} already: nothing to extend"
        )
    return {"left": across // 2, "right": across - across // 2, "top": down // 2, "bottom": down - down // 2}


def full(height: int, width: int, multiple: int) -> View:
    """The whole photograph at its own resolution, padded to the network's multiple."""
    return View(0, 0, height, width, (height, width), (_up(height, multiple), _up(width, multiple)))


def blocks(height: int, width: int, multiple: int) -> list[View]:
    """A photograph at its own resolution, in blocks that overlap, each padded to the network's multiple; one block
    where it is small.

    >>> [(view.top, view.height) for view in blocks(3000, 100, 16)]
    [(0, 1040), (992, 1040), (1984, 1016)]
    """

    def starts(length: int) -> list[tuple[int, int]]:
        count = max(1, math.ceil((length - LAP) / (BLOCK - LAP)))
        step = _up((length - LAP) / count, multiple)
        firsts = [0] + [i * step for i in range(1, count) if i * step < length - LAP]
        return [(first, min(step + LAP, length - first)) for first in firsts]

    return [replace(full(h, w, multiple), top=top, left=left) for top, h in starts(height) for left, w in starts(width)]


def lay(canvas: torch.Tensor, part: torch.Tensor, block: View) -> None:
    """Puts a block's picture into place, faded over what the blocks before it, row by row, have laid there, so that
    each of four has its bilinear share where they meet. What they agree on stays as it is, to the bit."""
    ramp = (torch.arange(LAP) + 1) / (LAP + 1)
    down, across, following = torch.ones(block.height, 1), torch.ones(block.width), torch.zeros(block.width)
    if block.top:
        down[:LAP, 0] = ramp
    if block.left:
        across[:LAP] = ramp
    if block.left + block.width < canvas.shape[-1]:
        following[-LAP:] = ramp  # the next one's share, which is laid over it
    block.crop(canvas).lerp_(part, across * down * (1 - following) / (1 - following * down))


def noise_at(seeds: list[int], top: int, left: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Standard Gaussian noise that depends on seed and position alone, so that blocks have the same where they
    overlap: (N, channels, *size)."""
    height, width = size
    rows, columns = (range(a // CELL, (a + n - 1) // CELL + 1) for a, n in ((top, height), (left, width)))

    def cell(seed: int, row: int, column: int) -> torch.Tensor:
        generator = np.random.Generator(np.random.Philox(key=[seed, row << 32 | column]))
        return torch.from_numpy(generator.standard_normal((channels, CELL, CELL), np.float32))

    noise = [torch.cat([torch.cat([cell(s, r, c) for c in columns], -1) for r in rows], -2) for s in seeds]
    return torch.stack(noise)[..., top % CELL :, left % CELL :][..., :height, :width]


def noise_of_step(seeds: list[int], block: View, step: int) -> torch.Tensor:
    """`noise_at` a block, other noise for each step of sampling: (N, 3, *outer)."""
    others = [(seed + (step + 1) * 0x9E3779B97F4A7C15) % 2**62 for seed in seeds]  # 2^64 by the golden ratio
    return noise_at(others, block.top, block.left, block.outer)


def enlarged(image: torch.Tensor, size: tuple[int, int], block: View) -> torch.Tensor:
    """`resize` of a picture to a larger (height, width), of which only a block is made: (B, C, height, width)."""
    if (block.height, block.width) == tuple(size):
        return resize(image, size)
    for dim, length, first, number in ((-2, size[0], block.top, block.height), (-1, size[1], block.left, block.width)):
        short = image.shape[dim]
        centre = (torch.arange(first, first + number) + 0.5) * (short / length) - 0.5
        low, high = max(0, int(centre[0]) - 2), min(short, int(centre[-1]) + 4)
        distance = (centre[:, None] - torch.arange(low, high)).abs()
        near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))  # Keys 1981, with a = -0.5
        weight = weight / weight.sum(1, keepdim=True)
        some = image.narrow(dim, low, high - low)
        image = torch.einsum("oi,bciw->bcow" if dim == -2 else "oi,bchi->bcho", weight, some)
    return image


def merge_chroma(gray: torch.Tensor, color: torch.Tensor, view: View) -> torch.Tensor:
    """The photograph's own luma (1, 3, H, W) with chroma of working size (B, 3, *outer): (B, 3, H, W).

    The chroma comes up by a fast guided filter: locally linear in luma, so that it changes where the
    photograph does and does not bleed over edges. It works in bands, so that memory stays bounded.

    Source: He & Sun 2015, "Fast Guided Filter".
    """
    height, width = view.inner
    color = color[..., :height, :width]
    light = luma(gray)
    if (height, width) != tuple(light.shape[-2:]):
        small = resize(light, view.inner)
        radius, softness = 2, 0.02
        mean_light, mean_color = box_mean(small, radius), box_mean(color, radius)
        slope = (box_mean(small * color, radius) - mean_light * mean_color) / (
            box_mean(small * small, radius) - mean_light * mean_light + softness
        )
        slope, offset = box_mean(slope, radius), box_mean(mean_color - slope * mean_light, radius)
    else:
        slope, offset = torch.zeros_like(color), color
    out = gray.new_empty(len(color), *gray.shape[1:])
    columns = _lines(light.shape[-1], width)
    rows = _lines(light.shape[-2], height)
    for band in torch.arange(light.shape[-2]).split(256):
        here = light[..., band[0] : band[-1] + 1, :]
        a, b = (_at(_at(x, rows[band], -2), columns, -1) for x in (slope, offset))
        out[..., band[0] : band[-1] + 1, :] = with_luma(here, a * here + b)
    return out


def _lines(long: int, short: int) -> torch.Tensor:
    """The centres of `long` pixels in the coordinates of `short`: (long,)."""
    return ((torch.arange(long) + 0.5) * (short / long) - 0.5).clamp(0, short - 1)


def _at(image: torch.Tensor, position: torch.Tensor, dim: int) -> torch.Tensor:
    """Linear interpolation along one dimension, at real-valued positions."""
    low = position.floor().long()
    high = (low + 1).clamp(max=image.shape[dim] - 1)
    shape = [1] * image.ndim
    shape[dim] = -1
    return torch.lerp(image.index_select(dim, low), image.index_select(dim, high), (position - low).reshape(shape))


def tile_places(
    height: int, width: int, tile: int, overlap: int, where: torch.Tensor | None = None
) -> list[tuple[int, int]]:
    """The left upper corners of the tiles that cover a picture, (y, x), row by row; those without a pixel of `where`
    (1, 1, H, W) are left out."""

    def starts(length: int) -> list[int]:
        if length <= tile:
            return [0]
        count = math.ceil((length - tile) / (tile - overlap))
        return sorted({min(i * (tile - overlap), (length - tile) // 16 * 16) for i in range(count)} | {length - tile})

    places = [(y, x) for y in starts(height) for x in starts(width)]
    return [(y, x) for y, x in places if where is None or where[..., y : y + tile, x : x + tile].any()]


def cheapest_tile(where: torch.Tensor, native: int, multiple: int, overlap: int) -> int:
    """The side, from `native` to twice that and at most 128, of those tiles that cover `where` (1, 1, H, W) with the
    fewest pixels: small ones follow a scratch, large ones overlap less."""
    height, width = where.shape[-2:]

    def pixels(tile: int) -> int:
        return len(tile_places(height, width, tile, overlap, where)) * min(tile, height) * min(tile, width)

    larger = [side for side in (native * 3 // 2, native * 2) if side <= 128 and side % 16 == side % multiple == 0]
    return min([native, *larger], key=pixels)


def halving(predict: Predict) -> Predict:
    """Wraps a noise-predicting callable: a batch that memory does not hold is done in halves. gamma is one for all.

    Raises:
        MemoryError: a sample alone is too large; the message says what helps.
    """

    def halved(sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        try:
            return predict(sample, gamma, condition)
        except RuntimeError as error:
            if not memory_full(error):
                raise
        # outside of the handler, whose traceback would hold the memory
        number, (height, width) = len(sample), sample.shape[-2:]
        if number == 1:
            raise MemoryError(
                f"no memory for one evaluation of {width}x{height} pixels on {sample.device}: a half-precision dtype, "
                "a smaller photograph or model, or device cpu takes less"
            )
        if sample.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = zip(sample.split(-(-number // 2)), condition.split(-(-number // 2)), strict=True)
        return torch.cat([halved(some, gamma, given) for some, given in parts])

    return halved


def at_once(pixels: int, batch: int = TILES) -> int:
    """How many tiles of so many pixels are evaluated at once; more fall out of a processor's caches."""
    return max(1, batch * 64 * 64 // pixels)


def tiled(predict: Predict, tile: int, overlap: int, where: torch.Tensor | None = None, batch: int = TILES) -> Predict:
    """Wraps a noise-predicting callable: tiles overlap, and their estimates are blended at every step.

    Tiles start at multiples of 16 pixels, so that a JPEG's 8x8 grid keeps its phase. A picture that fits into
    one tile passes through. Tiles without a pixel of `where` (1, 1, H, W) are left out, and come back as zeros.
    batch: tiles that are evaluated at once, if they have 64 pixels a side; fewer where they are larger.
    """
    if tile % 16 or overlap % 16 or not 0 <= overlap < tile:
        raise ValueError(f"tile is {tile}, overlap {overlap}: expected multiples of 16, overlap below tile")

    def blended(sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        height, width = sample.shape[-2:]
        if height <= tile and width <= tile:
            return predict(sample, gamma, condition)
        h, w = min(tile, height), min(tile, width)
        ramp = [torch.minimum(torch.arange(n) + 1, torch.arange(n, 0, -1)).clamp(max=max(1, overlap)) for n in (h, w)]
        window = (ramp[0][:, None] * ramp[1][None]).to(sample)
        total, weight = torch.zeros_like(sample), torch.zeros_like(sample[:1, :1])
        places = tile_places(height, width, tile, overlap, where)
        step = at_once(h * w * sample.shape[0], batch)
        for i in range(0, len(places), step):
            some = places[i : i + step]
            outputs = predict(
                torch.cat([sample[..., y : y + h, x : x + w] for y, x in some]),
                gamma,
                torch.cat([condition[..., y : y + h, x : x + w] for y, x in some]),
            ).split(sample.shape[0])
            for (y, x), output in zip(some, outputs, strict=True):
                total[..., y : y + h, x : x + w] += output * window
                weight[..., y : y + h, x : x + w] += window
        return total / weight.clamp_min(1e-6)

    return blended
