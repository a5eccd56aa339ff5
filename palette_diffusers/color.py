"""Luma and chroma, BT.601. Images are (B, 3, H, W), RGB, [-1, 1]; luma (B, 1, H, W) in [-1, 1]."""

import torch
import torch.nn.functional as F

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
EVENNESS = 0.003  # the pull to a pixel's own chroma, against 1 to each neighbour's: regions of some 18 pixels share it
LUMA_EDGE = 0.08  # the difference of luma across which they don't


def luma(image: torch.Tensor) -> torch.Tensor:
    """Y' = 0.299 R' + 0.587 G' + 0.114 B' (ITU-R BT.601): (B, 3, H, W) => (B, 1, H, W)."""
    red, green, blue = image.split(1, dim=-3)
    return (red * LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def chroma(image: torch.Tensor) -> torch.Tensor:
    """What luma leaves: RGB - Y', (B, 3, H, W); its own luma is zero."""
    return image - luma(image)


def with_luma(light: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """luma (B, 1, H, W) and chroma (B, 3, H, W) => RGB in [-1, 1] that has exactly this luma.

    Colours out of gamut are moved toward gray of the same luma, not clipped, which would change the luma.
    """
    room = torch.where(color > 0, 1 - light, 1 + light)
    scale = (room / color.abs().clamp_min(1e-6)).amin(-3, keepdim=True).clamp(0, 1)
    return light + scale * color


def is_gray(image: torch.Tensor, tolerance: float = 1.5 / 255) -> torch.Tensor:
    """Which pictures have no colour: (B,) bool. Half-range units: a channel may differ by under one 8-bit level."""
    return (image - image.mean(-3, keepdim=True)).abs().amax((-3, -2, -1)) < tolerance


def fit_to_edges(
    right: torch.Tensor, pull: torch.Tensor | float, light: torch.Tensor, edge: float, rounds: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The field x, (B, C, H, W), of pull * x - div(w grad x) = right, by `rounds` of conjugate gradients. It is smooth
    where luma (B, 1, H, W) is: w = exp(-(difference of luma / edge)^2 / 2).

    Source: Levin et al. 2004, "Colorization using Optimization".
    """
    across, down = (torch.exp(-(light.diff(dim=dim) / edge).square() / 2) for dim in (-1, -2))
    left, above = F.pad(across, [1, 0]), F.pad(down, [0, 0, 1, 0])
    right_of, below = F.pad(across, [0, 1]), F.pad(down, [0, 0, 0, 1])
    diagonal = pull + left + right_of + above + below

    def system(x: torch.Tensor) -> torch.Tensor:
        out = diagonal * x
        out[..., 1:] -= across * x[..., :-1]
        out[..., :-1] -= across * x[..., 1:]
        out[..., 1:, :] -= down * x[..., :-1, :]
        out[..., :-1, :] -= down * x[..., 1:, :]
        return out

    x = torch.zeros_like(right) if start is None else start.clone()
    rest = right - system(x)
    scaled = rest / diagonal
    step, before = scaled, (rest * scaled).sum((-2, -1), keepdim=True)
    for _ in range(rounds):
        image = system(step)
        length = before / (step * image).sum((-2, -1), keepdim=True).clamp_min(1e-12)
        x, rest = x + length * step, rest - length * image
        scaled = rest / diagonal
        now = (rest * scaled).sum((-2, -1), keepdim=True)
        step, before = scaled + now / before.clamp_min(1e-12) * step, now
    return x


def even_chroma(
    image: torch.Tensor,
    light: torch.Tensor,
    factor: float = 1.0,
    contrast: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
    rounds: int = 60,
) -> torch.Tensor:
    """An image (B, 3, H, W) => one of luma `light` (B, 1, H, W), its chroma evened out within regions of like luma, and
    multiplied by a factor; what differs from the picture's mean chroma by `contrast`, (B, 1, 1, 1), as well. `own`,
    (B, 1, H, W), is the share of a pixel's chroma that nobody gave; mean and contrast are of that part, since all else
    would be pushed away from what was given."""
    color = chroma(image)[:, ::2]  # green follows from the others, as chroma has no luma
    color = fit_to_edges(EVENNESS * color, EVENNESS, light, LUMA_EDGE, rounds, color).mul_(factor)
    if contrast is not None:
        contrast, own = contrast.to(color), torch.ones_like(light) if own is None else own.to(color)
        mean = (color * own).sum((-2, -1), keepdim=True) / own.sum((-2, -1), keepdim=True).clamp_min(1e-6)
        color = torch.lerp(mean, color, 1 + (contrast - 1) * own)
    red, blue = color.split(1, dim=1)
    green = (red * LUMA_WEIGHTS[0] + blue * LUMA_WEIGHTS[2]) / -LUMA_WEIGHTS[1]
    return with_luma(light, torch.cat([red, green, blue], 1))
