import hashlib

import numpy as np
import pytest
import torch

from palette_diffusers import get_task
from palette_diffusers.masks import (
    SIDES,
    border_mask,
    center_mask,
    extend,
    free_form_mask,
    grow,
    numpy_generator,
    rectangle_mask,
    seamless,
    uncropping_mask,
)


def digest(draw, count=6, size=(192, 256), **options) -> str:
    """Of what is drawn with the seeds 0, 1, ..."""
    masks = [draw(*size, torch.Generator().manual_seed(seed), **options) for seed in range(count)]
    assert all(mask.dtype == torch.float32 and mask.shape == (1, *size) for mask in masks)
    return hashlib.sha256(np.packbits(torch.stack(masks).numpy() > 0).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("draw", "options", "expected"),
    [
        (free_form_mask, {}, "36db732ef04be1c6"),
        (free_form_mask, dict(size=(24, 31), count=20), "6aab7de31bae9bee"),
        (free_form_mask, dict(area=(0.2, 0.3)), "a9e9a6665bc235b8"),
        (rectangle_mask, {}, "90676fb02f273716"),
        (rectangle_mask, dict(size=(24, 31), count=20), "7950b06e3b662dba"),
        (rectangle_mask, dict(size=(3, 4), count=20), "932298c623d8a16d"),
        (rectangle_mask, dict(area=(0.2, 0.3), count=20), "e8340590befeeca4"),
        (uncropping_mask, dict(count=20), "1605f096c3718a1d"),
    ],
)
def test_a_seed_means_the_same_mask_in_every_version(draw, options, expected):
    """Recorded from version 0.1.0: a change here changes what every seed and every resumed run means."""
    assert digest(draw, **options) == expected


def test_a_torch_seed_makes_a_numpy_seed():
    """Recorded, too; and the next draw is another one."""
    generator = torch.Generator().manual_seed(0)
    first, second = (numpy_generator(generator).integers(0, 1000, 3).tolist() for _ in range(2))
    assert (first, second) == ([70, 396, 110], [814, 824, 924])


@pytest.mark.parametrize("draw", [free_form_mask, rectangle_mask])
def test_areas_that_can_be_asked_for(draw, seeded):
    assert draw(16, 16, seeded(), area=(0.5, 1)).mean() >= 0.5
    for area in ((0, 0.5), (0.3, 0.3), (0.5, 0.2), (0.5, 1.5), (-0.1, 0.5)):
        with pytest.raises(ValueError, match=r"area is \(.*expected \(low, high\) with 0 < low < high <= 1"):
            draw(16, 16, area=area)
    for size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"a mask of {size[1]}x{size[0]} was asked for, expected at least 1x1"):
            draw(*size)
    assert draw(1, 1, seeded()).shape == (1, 1, 1)


def test_the_number_of_rectangles(seeded):
    """One is one; many are more corners than one has."""
    for seed in range(20):
        kept = torch.nonzero(rectangle_mask(40, 60, seeded(seed), count=(1, 1))[0])
        (top, left), (bottom, right) = kept.min(0).values.tolist(), kept.max(0).values.tolist()
        assert (bottom - top + 1) * (right - left + 1) == len(kept)
    profiles = [rectangle_mask(90, 90, seeded(seed), count=(6, 6))[0].sum(1).unique() for seed in range(5)]
    assert min(len(profile) for profile in profiles) > 3


@pytest.mark.parametrize("side", SIDES)
def test_borders(side):
    mask = border_mask(10, 20, **{side: 3})[0]
    inside = torch.zeros(10, 20)
    inside[{"top": slice(0, 3), "bottom": slice(-3, None)}.get(side, slice(None)),
        {"left": slice(0, 3), "right": slice(-3, None)}.get(side, slice(None))] = 1  # fmt: skip
    assert torch.equal(mask, inside)
    with pytest.raises(ValueError, match=f"{side}=-1.*expected no negative number"):
        border_mask(10, 20, **{side: -1})


def test_a_border_leaves_something():
    assert (border_mask(10, 20, left=10, right=9, top=5, bottom=4) == 0).sum() == 1
    for sides in (dict(left=10, right=10), dict(top=5, bottom=5), dict(left=20), dict(bottom=11)):
        with pytest.raises(ValueError, match="leaves nothing of a 20x10 picture"):
            border_mask(10, 20, **sides)
    with pytest.raises(ValueError, match="0x5"):
        border_mask(5, 0)


def test_the_centre():
    mask = center_mask(16, 24, 0.5)[0]
    expected = torch.zeros(16, 24)
    expected[4:12, 6:18] = 1
    assert torch.equal(mask, expected)
    assert center_mask(5, 7, 1).all() and center_mask(9, 9, 0.01).sum() == 1 and center_mask(1, 1, 0.1).all()
    for share in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"share is {share}, expected 0 < share <= 1"):
            center_mask(8, 8, share)
    with pytest.raises(ValueError, match="a mask of 8x0"):
        center_mask(0, 8)


@pytest.mark.parametrize("size", [(40, 70), (41, 31)])
def test_uncropping_keeps_half_on_its_side(size, seeded):
    height, width = size
    kinds = set()
    for seed in range(40):
        mask = uncropping_mask(height, width, seeded(seed))[0]
        kept = torch.nonzero(mask == 0)
        (top, left), (bottom, right) = kept.min(0).values.tolist(), kept.max(0).values.tolist()
        borders = dict(left=left, right=width - 1 - right, top=top, bottom=height - 1 - bottom)
        sides = tuple(name for name in SIDES if borders[name])
        kinds.add(sides)
        if len(sides) == 1:
            assert borders[sides[0]] == (width if sides[0] in ("left", "right") else height) // 2
        else:
            assert abs(borders["left"] - borders["right"]) <= 1 and abs(borders["top"] - borders["bottom"]) <= 1
    assert kinds == {(name,) for name in SIDES} | {SIDES}


def test_a_mask_grows_evenly():
    mask = torch.zeros(2, 1, 11, 13)
    mask[0, 0, 5, 6] = mask[1, 0, 0, 0] = 1
    grown = grow(mask, 2)
    assert grown.shape == mask.shape and grown[0].sum() == 25 and grown[0, 0, 3:8, 4:9].all()
    assert grown[1].sum() == 9 and grown[1, 0, :3, :3].all()
    assert torch.equal(grow(mask, 0), mask)
    with pytest.raises(ValueError, match="pixels is -1, expected at least 0"):
        grow(mask, -1)


def test_extension_of_a_constant_is_that_constant(seeded):
    """At every size, odd ones and lines of pixels, too: a border counted as zero would darken it."""
    for size in ((1, 9), (9, 1), (7, 13), (33, 17), (1, 1)):
        known = (torch.rand(1, 1, *size, generator=seeded(1)) < 0.2).float()
        known[..., 0, 0] = 1
        out = extend(torch.where(known > 0, 0.7, torch.tensor(-5.0)).expand(2, 3, *size), known)
        torch.testing.assert_close(out, torch.full((2, 3, *size), 0.7))
    line = extend(torch.tensor([[[[2.0, 0.0, 0.0, 4.0]]]]), torch.tensor([[[[1.0, 0, 0, 1]]]]))
    assert torch.equal(line, torch.tensor([[[[2.0, 2.5, 3.5, 4.0]]]]))


def test_seamless_moves_the_fill_by_the_step_at_its_border():
    """A fill that is off by a constant is right afterwards, pixel by pixel, whatever was known of the hole."""
    known = torch.linspace(-0.5, 0.5, 24).expand(1, 3, 20, 24).clone()
    mask = torch.zeros(1, 1, 20, 24)
    mask[..., 6:14, 8:16] = 1
    flat = torch.full_like(known, 0.25)
    out = seamless(flat - 0.75, torch.where(mask > 0, 9.0, flat), mask)
    torch.testing.assert_close(out, flat)
    out = seamless(known - 0.3, torch.where(mask > 0, 0.0, known), mask)
    assert torch.equal(out * (1 - mask), known * (1 - mask)) and (out - known).abs().max() < 0.1


def test_inpainting_draws_both_kinds_and_uncropping_its_own(seeded):
    kinds = []
    for seed in range(12):
        generator = seeded(seed)
        kinds.append(torch.rand((), generator=generator).item() < 0.6)
        expected = (free_form_mask if kinds[-1] else rectangle_mask)(30, 44, generator)
        assert torch.equal(get_task("inpainting").draw_mask(30, 44, seeded(seed)), expected)
        mask = get_task("uncropping").draw_mask(30, 44, seeded(seed))
        assert torch.equal(mask, uncropping_mask(30, 44, seeded(seed)))
    assert 3 < sum(kinds) < 12
