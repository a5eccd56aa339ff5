"""Colour hints: a few coloured strokes on a transparent picture, which colorization honours.

Images are (B, 3, H, W), RGB, [-1, 1]; weights (B, 1, H, W), 0 where there is no stroke.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .canvas import ImageInput, Picture, read
from .color import chroma, fit_to_edges, luma, with_luma

STRENGTH = 100.0  # of a stroke, against the smoothness of one pixel
DECAY = 1e-3  # of a hint with distance: to a third over 30 pixels of the model's where no edge is
EDGE = 0.08  # the difference of luma across which a hint stops spreading


@dataclass(frozen=True)
class Hints:
    """color: the strokes' chroma, (B, 3, H, W). weight: how much of a pixel is stroke, (B, 1, H, W)."""

    color: torch.Tensor
    weight: torch.Tensor

    def seen(self, inner: tuple[int, int], outer: tuple[int, int]) -> "Hints":
        """Scaled down to `inner` and padded to `outer`, as the model sees a photograph; a thin stroke stays one."""
        weight = F.adaptive_avg_pool2d(self.weight, inner)
        color = F.adaptive_avg_pool2d(self.color * self.weight, inner) / weight.clamp_min(1e-6)
        margin = [0, outer[1] - inner[1], 0, outer[0] - inner[0]]
        return Hints(F.pad(color, margin), F.pad(weight, margin))

    @staticmethod
    def of_batch(several: "list[Hints | None]", sizes: list[tuple], number: int) -> "Hints":
        """Those of several photographs, (inner, outer) each, `number` times in a row; None is without a stroke."""
        out = []
        for hints, (inner, outer) in zip(several, sizes, strict=True):
            none = Hints(torch.zeros(1, 3, *outer), torch.zeros(1, 1, *outer))
            small = none if hints is None else hints.seen(inner, outer)
            out += [small] * number
        return Hints(torch.cat([h.color for h in out]), torch.cat([h.weight for h in out]))

    def spread(self, color: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
        """Chroma (B, 3, H, W) => the same, moved to the strokes' where they are, and around them as far as luma
        (B, 1, H, W) has no edge."""
        weight = self.weight.to(color)
        change = self.color.to(color) - color
        # with a pull to zero, so that a hint stays local
        return color + fit_to_edges(STRENGTH * weight * change, STRENGTH * weight + DECAY, light, EDGE, 200)

    def imposed(self, image: torch.Tensor) -> torch.Tensor:
        """A colorized photograph => the same, its strokes of exactly their chroma."""
        return torch.where(self.weight > 0.5, with_luma(luma(image), self.color), image)


def read_hints(source: ImageInput, picture: Picture) -> Hints:
    """A picture of strokes, transparent elsewhere => hints for `picture`.

    Raises:
        ValueError: no transparency, no stroke, or another size than the picture's.
    """
    strokes = read(source, max_pixels=max(picture.size[0] * picture.size[1], 1))
    if strokes.size != picture.size:
        (h, w), (height, width) = strokes.size, picture.size
        raise ValueError(f"hints are {w}x{h}, the image {width}x{height}: they must have the same size")
    if strokes.alpha is None:
        raise ValueError("the hints have no transparency: coloured strokes on a transparent picture were expected")
    weight = (strokes.alpha > 0.5).float()
    if not weight.any():
        raise ValueError("the hints are empty: no stroke is opaque")
    return Hints(chroma(strokes.image) * weight, weight)
