"""Masks for inpainting and uncropping: float32 (1, H, W), 1 = generate, 0 = keep; and what borders a hole.

What draws takes a `torch.Generator`; the same seed gives the same mask on every machine.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

SIDES = ("left", "right", "top", "bottom")


def numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """A numpy generator seeded by the next draw of a torch one."""
    return np.random.default_rng(torch.randint(0, 2**62, (2,), generator=generator).tolist())


def _check(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a mask of {width}x{height} was asked for, expected at least 1x1")


def _stroke(draw: ImageDraw.ImageDraw, height: int, width: int, rng: np.random.Generator) -> None:
    """One polyline of round brush strokes; lengths are those of DeepFillv2 at 256 pixels, scaled."""
    unit = math.sqrt(height * width) / 256
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    for vertex in range(rng.integers(1, 13)):
        angle = rng.uniform(0, 2 * math.pi)
        if vertex % 2 == 0:
            angle = 2 * math.pi - angle
        length, brush = rng.uniform(10, 60) * unit, rng.uniform(12, 40) * unit
        # the float end is kept inside, or strokes drift out of the picture and the area shrinks
        end_x = min(max(x + length * math.cos(angle), 0), width)
        end_y = min(max(y + length * math.sin(angle), 0), height)
        draw.line((x, y, end_x, end_y), fill=255, width=max(1, round(brush)))
        for cx, cy in ((x, y), (end_x, end_y)):
            draw.ellipse((cx - brush / 2, cy - brush / 2, cx + brush / 2, cy + brush / 2), fill=255)
        x, y = end_x, end_y


def free_form_mask(
    height: int,
    width: int,
    generator: torch.Generator | None = None,
    area: tuple[float, float] = (0.1, 0.4),
) -> torch.Tensor:
    """Brush strokes (DeepFillv2, Yu et al. 2019, Algorithm 1), added until the share of the picture that
    is masked falls into `area`: (1, H, W).

    >>> mask = free_form_mask(64, 64, torch.Generator().manual_seed(0), area=(0.2, 0.3))
    >>> 0.2 <= mask.mean().item() <= 0.3
    True
    """
    _check(height, width)
    low, high = area
    if not 0 < low < high <= 1:
        raise ValueError(f"area is {area}, expected (low, high) with 0 < low < high <= 1")
    rng = numpy_generator(generator)
    # a target drawn first: stopping at `low` would favour small holes
    target = rng.uniform(low, high)
    best, best_gap = None, math.inf
    for _ in range(100):
        picture = Image.new("L", (width, height))
        draw = ImageDraw.Draw(picture)
        share = 0.0
        while share < min(target, (low + high) / 2 if best is None else target):
            _stroke(draw, height, width, rng)
            share = np.count_nonzero(np.asarray(picture)) / (height * width)
        gap = max(low - share, share - high, 0.0)
        if gap < best_gap:
            best, best_gap = np.asarray(picture), gap
        if best_gap == 0:
            break
    assert best is not None
    mask = torch.from_numpy((best > 0).astype(np.float32))[None]
    flips = [axis for axis in (1, 2) if rng.random() < 0.5]
    return mask.flip(flips)


def rectangle_mask(
    height: int,
    width: int,
    generator: torch.Generator | None = None,
    area: tuple[float, float] = (0.1, 0.4),
    count: tuple[int, int] = (1, 5),
) -> torch.Tensor:
    """1 to 5 rectangles that together cover 10 to 40% (the paper's appendix): (1, H, W)."""
    _check(height, width)
    low, high = area
    if not 0 < low < high <= 1:
        raise ValueError(f"area is {area}, expected (low, high) with 0 < low < high <= 1")
    rng = numpy_generator(generator)
    number = int(rng.integers(count[0], count[1] + 1))
    best, best_gap = None, math.inf
    for _ in range(200):
        mask = np.zeros((height, width), np.float32)
        target = rng.uniform(low, high)
        for share in rng.dirichlet(np.full(number, 4.0)) * target:
            ratio = math.exp(rng.uniform(-0.7, 0.7))
            h = min(height, max(1, round(math.sqrt(share * height * width * ratio))))
            w = min(width, max(1, round(share * height * width / h)))
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            mask[top : top + h, left : left + w] = 1
        gap = max(low - mask.mean(), mask.mean() - high, 0.0)
        if gap < best_gap:
            best, best_gap = mask, gap
        if best_gap == 0:
            break
    assert best is not None
    return torch.from_numpy(best)[None]


def border_mask(height: int, width: int, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> torch.Tensor:
    """The border of a picture, in pixels per side: (1, H, W).

    >>> border_mask(2, 4, left=1)[0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """
    _check(height, width)
    if min(left, right, top, bottom) < 0:
        raise ValueError(f"border left={left} right={right} top={top} bottom={bottom}: expected no negative number")
    if left + right >= width or top + bottom >= height:
        raise ValueError(
            f"border left={left} right={right} top={top} bottom={bottom} leaves nothing of a {width}x{height} picture"
        )
    mask = torch.ones(1, height, width)
    mask[:, top : height - bottom, left : width - right] = 0
    return mask


def uncropping_mask(height: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The paper's: with equal chance one side (any of four) or all four; always 50% of the area: (1, H, W)."""
    rng = numpy_generator(generator)
    if rng.random() < 0.5:
        side = SIDES[rng.integers(4)]
        return border_mask(height, width, **{side: (width if side in ("left", "right") else height) // 2})
    h, w = round(height * math.sqrt(0.5)), round(width * math.sqrt(0.5))
    top, left = (height - h) // 2, (width - w) // 2
    return border_mask(height, width, left=left, right=width - w - left, top=top, bottom=height - h - top)


def center_mask(height: int, width: int, share: float = 0.5) -> torch.Tensor:
    """A centred rectangle with `share` of each side (128 of 256 pixels in the paper's benchmark): (1, H, W)."""
    _check(height, width)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected 0 < share <= 1")
    h, w = max(1, round(height * share)), max(1, round(width * share))
    top, left = (height - h) // 2, (width - w) // 2
    mask = torch.zeros(1, height, width)
    mask[:, top : top + h, left : left + w] = 1
    return mask


def grow(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """A mask (B, 1, H, W) that reaches `pixels` further on every side.

    >>> grow(torch.tensor([[[[0.0, 0, 0, 1]]]]), 1).squeeze().tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    if pixels < 0:
        raise ValueError(f"pixels is {pixels}, expected at least 0")
    wide = F.max_pool2d(mask, (1, 2 * pixels + 1), stride=1, padding=(0, pixels))
    return F.max_pool2d(wide, (2 * pixels + 1, 1), stride=1, padding=(pixels, 0))


def extend(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Values (B, C, H, W), known where `known` (B, 1, H, W) is 1, continued smoothly over the rest.

    Source: pull-push, Gortler et al. 1996, "The Lumigraph", section 3.4.

    >>> extend(torch.tensor([[[[2.0, 0.0, 0.0, 4.0]]]]), torch.tensor([[[[1.0, 0, 0, 1]]]])).squeeze().tolist()
    [2.0, 2.5, 3.5, 4.0]
    """
    if max(values.shape[-2:]) == 1 or (values.device.type == "cpu" and known.bool().all()):  # a GPU would be waited for
        return values
    pool: Any = dict(kernel_size=2, ceil_mode=True, count_include_pad=False)
    weight = F.avg_pool2d(known, **pool)
    coarse = extend(F.avg_pool2d(values * known, **pool) / weight.clamp_min(1e-6), (weight > 0).to(known))
    return torch.where(known > 0, values, F.interpolate(coarse, values.shape[-2:], mode="bilinear"))


def _sums(image: torch.Tensor, number: int, dim: int) -> torch.Tensor:
    """Of so many in a row along one dimension, by doubling: many times as fast as `avg_pool2d` on a CPU."""
    if number == 1:
        return image
    half = number // 2
    some = _sums(image, half, dim)
    rest = some.shape[dim] - half
    some = some.narrow(dim, 0, rest) + some.narrow(dim, half, rest)
    if number % 2 == 0:
        return some
    return some.narrow(dim, 0, rest - 1) + image.narrow(dim, number - 1, rest - 1)


def box_mean(image: torch.Tensor, radius: int) -> torch.Tensor:
    """Means over squares of 2 radius + 1 pixels, the border repeated: (B, C, H, W)."""
    side = 2 * radius + 1
    padded = F.pad(image, [radius] * 4, mode="replicate")
    return _sums(_sums(padded, side, -2), side, -1) / side**2


def seamless(sample: torch.Tensor, known: torch.Tensor, mask: torch.Tensor, radius: int = 1) -> torch.Tensor:
    """Shifts what was generated so that its colours meet those around it: all (B, C, H, W), the mask (B, 1, H, W).

    Along the border, the difference between the means outside and inside is continued over the hole, as a
    membrane would be. Source: Perez et al. 2003, "Poisson Image Editing", with pull-push as the solver.
    """
    near: Any = dict(kernel_size=2 * radius + 1, stride=1, padding=radius)
    keep = 1 - mask

    def mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return box_mean(values * weight, radius) / box_mean(weight, radius).clamp_min(1e-6)

    ring = mask * F.max_pool2d(keep, **near) + keep * F.max_pool2d(mask, **near)
    step = mean(known, keep) - mean(sample, mask)
    return torch.where(mask > 0, sample + extend(step, ring), known)
