"""Texture for what was brought up from the model's size, and is smooth where the photograph around it is not.

Random-phase noise of the surroundings' spectrum (Galerne, Gousseau and Morel 2011, "Random Phase Textures: Theory and
Synthesis"), from place to place: wood, grass, sand and fur go on. What is no such texture (a lattice before the sky, an
edge) differs from patch to patch, and is left out: there, the calmer patches have far less power than the mean of all.
Images are (B, 3, H, W), RGB, [-1, 1].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .color import luma

PATCH = 24  # pixels a side, where the photograph is 6 times the model's size; larger where it is more
NEAR = 64  # patches of the surroundings that a place's texture is taken from
FEWEST = 16  # of them, below which nothing is told
INSIDE = 9  # patches of the fill, whose own spectrum is taken off
CALM = 0.2  # the quantile of their power that counts
GATE = (0.25, 0.6)  # its share of the mean power: at most the first is no texture, from the second on all of it is
WAVES = 1.4  # a patch; longer ones are the model's
REACH = 5  # patches that the surroundings reach
BLOCK = (480, 1920)  # pixels that are worked on together, about
NUMBERS = 2_000_000  # of spectra, likewise


def patch_size(view: int, native: int) -> int:
    """The side of patches where the model's `native` pixels are `view` of the photograph's, a multiple of 4.

    >>> patch_size(400, 64), patch_size(4000, 64)
    (24, 96)
    """
    return min(96, max(PATCH, round(PATCH * view / (6 * native) / 4) * 4))


def add_texture(
    image: torch.Tensor, part: torch.Tensor, unknown: torch.Tensor, patch: int,
    noise: Callable[[int, int, tuple[int, int]], torch.Tensor],
) -> None:  # fmt: skip
    """Adds the luma that a filled hole lacks, in place, to images (B, 3, H, W).

    Args:
        part: the hole, (1, 1, H, W), 1 in it. Where there is no room in it for a patch, or under 16 patches around it,
            nothing is added.
        unknown: that and other holes, (1, 1, H, W), which tell nothing.
        patch: pixels a side, a multiple of 4, of the patches whose spectra are compared.
        noise: standard Gaussian noise from a row and a column on, of a size: (B, 1, *size). Asked for up to `patch`
            rows and columns beyond the image.
    """
    height, width = part.shape[-2:]
    # all blocks see the untouched image; they begin at multiples of a patch, so that they see the same patches
    down, across = (max(patch, length // patch * patch) for length in BLOCK)
    blocks = [
        (slice(top, min(height, top + down)), slice(left, min(width, left + across)))
        for top in range(0, height, down)
        for left in range(0, width, across)
    ]
    blocks = [(rows, columns) for rows, columns in blocks if part[..., rows, columns].any()]
    made = [_missing(image, part, unknown, patch, rows, columns, noise) for rows, columns in blocks]
    for (rows, columns), some in zip(blocks, made, strict=True):
        target, where = (x[..., rows, columns] for x in (image, part))
        target[:] = torch.where(where > 0, (target + some).clamp(-1, 1), target)


def _missing(
    image: torch.Tensor, part: torch.Tensor, unknown: torch.Tensor, patch: int, rows: slice, columns: slice,
    noise: Callable[[int, int, tuple[int, int]], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The luma that a block lacks, (B, 1, h, w), in half precision: it is kept until all blocks are done."""
    half, reach = patch // 2, REACH * patch
    while True:  # deep in a wide border, what is known is far
        first, left = max(0, rows.start - reach), max(0, columns.start - reach)
        around = (..., slice(first, rows.stop + reach), slice(left, columns.stop + reach))
        if (unknown[around] == 0).sum() >= FEWEST * patch**2 or unknown[around].shape == unknown.shape:
            break
        reach *= 2
    size = rows.stop - rows.start, columns.stop - columns.start
    tiles = -(-size[0] // half) + 1, -(-size[1] // half) + 1
    ground = noise(rows.start - half, columns.start - half, ((tiles[0] + 1) * half, (tiles[1] + 1) * half))
    out = image.new_zeros(len(image), 1, *size, dtype=torch.float16)
    for still, picture, lacks in zip(ground.split(1), image.split(1), out.split(1), strict=True):
        spectra = _Spectra.of(luma(picture[around]), part[around], unknown[around], patch)
        if spectra is not None:
            corner = rows.start - first, columns.start - left
            lacks[:] = _filtered(still, spectra, tiles, corner)[..., : size[0], : size[1]]
    return out


class _Spectra:
    """Power spectra (K, patch, patch // 2 + 1) of patches around a hole, and in it, and where their centres are."""

    def __init__(self, known: tuple[torch.Tensor, torch.Tensor], inside: tuple[torch.Tensor, torch.Tensor], patch: int):
        self.known, self.inside, self.patch = known, inside, patch
        down, across = torch.fft.fftfreq(patch)[:, None], torch.fft.rfftfreq(patch)[None]
        cut = WAVES / patch
        self.fine = ((torch.hypot(down, across) - 0.7 * cut) / (0.6 * cut)).clamp(0, 1)

    @classmethod
    def of(cls, light: torch.Tensor, part: torch.Tensor, unknown: torch.Tensor, patch: int) -> "_Spectra | None":
        """Of luma (1, 1, H, W); None where there are too few."""
        half = patch // 2
        if min(light.shape[-2:]) < patch:
            return None
        hidden, within = (F.avg_pool2d(x, patch, half)[0, 0] for x in (unknown, part))
        reach = 2 * REACH
        near = F.max_pool2d((within > 0).float()[None], 2 * reach + 1, 1, reach)[0] > 0
        outside, inside = (hidden == 0) & near, within == 1
        if outside.sum() < FEWEST or not inside.any():
            return None
        window = _window(patch)

        def spectra(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            patches = light[0, 0].unfold(0, patch, half).unfold(1, patch, half)[chosen]
            patches = patches - (patches * window).sum((-2, -1), keepdim=True) / window.sum()
            power = torch.fft.rfft2(patches * window).abs().square() / window.square().sum()
            return torch.nonzero(chosen) * half + patch / 2, power

        return cls(spectra(outside), spectra(inside), patch)

    def missing(self, centres: torch.Tensor) -> torch.Tensor:
        """The amplitude by which noise is to be filtered at some places (T, 2), (T, patch, patch // 2 + 1)."""
        number = min(NEAR, len(self.known[0]))
        around = self.known[1][_nearest(centres, self.known[0], number)]
        rank = max(1, round(CALM * number))
        # power is distributed exponentially in a texture, whose quantile so tells its mean
        calm = around.kthvalue(rank, dim=1).values / -math.log(1 - CALM)
        sums = [(each * self.fine).sum((-2, -1)) for each in (calm, around.mean(1))]
        gate = ((sums[0] / sums[1].clamp_min(1e-12) - GATE[0]) / (GATE[1] - GATE[0])).clamp(0, 1)
        own = self.inside[1][_nearest(centres, self.inside[0], min(INSIDE, len(self.inside[0])))].mean(1)
        return (calm - own).clamp_min(0).sqrt() * self.fine * gate[:, None, None]


def _nearest(centres: torch.Tensor, places: torch.Tensor, number: int) -> torch.Tensor:
    return torch.cdist(centres, places).topk(number, dim=1, largest=False).indices


def _window(patch: int) -> torch.Tensor:
    """Of half a patch's distance, they sum to 1."""
    line = torch.sin(torch.pi * (torch.arange(patch) + 0.5) / patch).square()
    return line[:, None] * line


def _filtered(noise: torch.Tensor, spectra: _Spectra, tiles: tuple[int, int], corner: tuple[int, int]) -> torch.Tensor:
    """Noise (1, 1, H, W) of so many `tiles`, the first centred on `corner` of the spectra's, filtered by what is
    missing from place to place: what all tiles reach, (1, 1, H - patch, W - patch)."""
    patch, half = spectra.patch, spectra.patch // 2
    rows, columns = (torch.arange(n) // 2 for n in tiles)  # four tiles share a spectrum
    which = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
    middles = torch.cartesian_prod(rows.unique(), columns.unique()) * patch + half / 2 + torch.tensor(corner)
    many = max(1, NUMBERS // (NEAR * patch * (half + 1)))
    amplitude = torch.cat([spectra.missing(some) for some in middles.split(many)])
    cut = noise[0, 0].unfold(0, patch, half).unfold(1, patch, half).reshape(-1, patch, patch)
    window = _window(patch)
    made = [
        torch.fft.irfft2(torch.fft.rfft2(some) * amplitude[index], s=(patch, patch)) * window
        for some, index in zip(cut.split(4096), which.split(4096), strict=True)
    ]
    flat = torch.cat(made).reshape(1, -1, patch * patch).transpose(1, 2)
    return F.fold(flat, noise.shape[-2:], patch, stride=half)[..., half:-half, half:-half]
