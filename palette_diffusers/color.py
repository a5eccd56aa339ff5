"""Luma and chroma, BT.601. Images are (B, 3, H, W), RGB, [-1, 1]; luma (B, 1, H, W) in [-1, 1]."""

import torch

LUMA_WEIGHTS = (0.299, 0.587, 0.114)


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
