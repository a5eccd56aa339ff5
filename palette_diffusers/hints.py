"""Colour hints: a few coloured strokes on a transparent picture, which colorization honours.

Images are (B, 3, H, W), RGB, [-1, 1]; weights (B, 1, H, W), 0 where there is no stroke.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .canvas import ImageInput, Picture, read
from .color import chroma, fit_to_edges, luma, with_luma
from .masks import box_mean
from .sizes import View, merge_chroma, resize

SIDE = 192  # pixels at most, of the longer side, at which strokes spread; more where the model sees more
STRENGTH = 100.0  # of a stroke, against the smoothness of one pixel
DECAY = 1e-4  # of a hint with distance: to a third over 100 pixels of `SIDE` where no edge is
EDGE = 0.05  # the difference of luma between two such pixels across which a hint stops spreading


@dataclass(frozen=True)
class Hints:
    """color: the strokes' chroma, (1, 3, H, W), 0 elsewhere. weight: 1 where there is a stroke, (1, 1, H, W)."""

    color: torch.Tensor
    weight: torch.Tensor

    def spread(self, image: torch.Tensor, least: int) -> "Spread":
        """Over a photograph (1, 3, H, W), as far as its luma has no edge, at a size that shows its edges: a longer side
        of `SIDE`, at least `least`, at most its own.

        Source: Levin et al. 2004, "Colorization using Optimization"; with a pull to zero, so that a hint stays local.
        """
        longer = max(image.shape[-2:])
        side = min(longer, max(SIDE, least))
        size = tuple(max(1, round(length * side / longer)) for length in image.shape[-2:])
        color, weight = (F.adaptive_avg_pool2d(x, size) for x in (self.color, self.weight))  # a thin stroke stays one
        decay, edge = DECAY * (SIDE / side) ** 2, EDGE * (SIDE / side) ** 0.43  # smaller pictures' edges are steeper
        right, light = STRENGTH * torch.cat([color, weight], 1), resize(luma(image), size)
        field = fit_to_edges(right, STRENGTH * weight + decay, light, edge, min(2 * side + 20, 600))
        return Spread(field[:, :3], field[:, 3:].clamp(0, 1))

    def imposed(self, image: torch.Tensor) -> torch.Tensor:
        """A colorized photograph => the same, its strokes of exactly their chroma."""
        return torch.where(self.weight > 0.5, with_luma(luma(image), self.color), image)


@dataclass(frozen=True)
class Spread:
    """share: how much of a pixel's chroma is the strokes', (B, 1, h, w). color: that part of it, (B, 3, h, w)."""

    color: torch.Tensor
    share: torch.Tensor

    def seen(self, inner: tuple[int, int], outer: tuple[int, int]) -> "Spread":
        """Scaled to `inner` and padded to `outer`, as the model sees a photograph."""
        margin = [0, outer[1] - inner[1], 0, outer[0] - inner[0]]
        color, share = (F.pad(resize(x, inner), margin) for x in (self.color, self.share))
        return Spread(color, share.clamp(0, 1))

    @staticmethod
    def of_batch(several: "list[Spread | None]", views: list[View], number: int) -> "Spread":
        """Those of several photographs, as they are seen, `number` times in a row; None is without a stroke."""
        out = []
        for one, view in zip(several, views, strict=True):
            none = Spread(torch.zeros(1, 3, *view.outer), torch.zeros(1, 1, *view.outer))
            out += [none if one is None else one.seen(view.inner, view.outer)] * number
        return Spread(torch.cat([each.color for each in out]), torch.cat([each.share for each in out]))

    def of_step(self, steps: int) -> "Spread":
        """What one of so many steps takes, after which the share is reached, if what remains is left alone: whole at
        every step, a share of 15% would be nearly all in the end."""
        share = 1 - (1 - self.share) ** (1 / steps)
        return Spread(self.color * share / self.share.clamp_min(1e-6), share)

    def blend(self, color: torch.Tensor) -> torch.Tensor:
        """Chroma (B, 3, h, w) => the same, moved to the strokes' by their share."""
        return color * (1 - self.share.to(color)) + self.color.to(color)

    def merged(self, gray: torch.Tensor, color: torch.Tensor, view: View) -> torch.Tensor:
        """`merge_chroma` of a photograph whose strokes these are: theirs and the model's chroma (B, 3, *outer) come
        together where its edges are seen, the model's without what a stroke gave to pixels across an edge."""
        height, width = view.inner
        rest = (1 - self.seen(view.inner, view.inner).share) ** 3  # what strokes had no part in counts
        own = color[..., :height, :width]
        around = box_mean(rest * own, 2) / (box_mean(rest, 2) + 1e-3)
        own = (rest * own + 0.1 * around) / (rest + 0.1)
        rows, columns = size = (self.color.shape[-2], self.color.shape[-1])
        own = chroma(merge_chroma(resize(gray, size), own, View(0, 0, rows, columns, view.inner, view.inner)))
        return merge_chroma(gray, self.blend(own), View(0, 0, gray.shape[-2], gray.shape[-1], size, size))


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
