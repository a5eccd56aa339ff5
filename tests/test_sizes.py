import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from palette_diffusers import masks, sizes
from palette_diffusers.color import chroma, luma

side = st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(height=side, width=side, native=st.sampled_from([32, 64, 256]), multiple=st.sampled_from([4, 8, 32]))
def test_views_fit_the_network(height, width, native, multiple):
    view = sizes.fit(height, width, native, multiple)
    for outer, inner in zip(view.outer, view.inner, strict=True):
        assert outer % multiple == 0 and inner <= outer < max(inner + multiple, 2 * multiple + 1)
    if min(height, width) * 4 >= max(height, width) and min(height, width) >= native:
        ratio = view.inner[0] / view.inner[1] / (height / width)
        assert 0.9 < ratio < 1.12 and 0.5 < view.inner[0] * view.inner[1] / native**2 < 2


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), data=st.data())
def test_hole_views_hold_the_hole(height, width, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(1, 1, height, width)
    mask[..., y:, x:] = 1
    view = sizes.hole_view(mask, 32, 4)
    assert view.top >= 0 and view.top + view.height <= height and view.left + view.width <= width
    inside = mask[..., view.top : view.top + view.height, view.left : view.left + view.width]
    assert inside.sum() == mask.sum()


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_padding_reflects(height, width):
    image = torch.rand(1, 3, height, width)
    padded = sizes.pad_to(image, (41, 43))
    assert torch.equal(padded[..., :height, :width], image)
    if width > 2:
        assert torch.equal(padded[..., :height, width], image[..., width - 2])


def test_tiles_blend_to_what_the_whole_would_give():
    """A pointwise network gives the same in tiles as at once, at every size, without a seam."""
    calls = []

    def predict(sample, gamma, condition):
        calls.append(tuple(sample.shape))
        return sample * 2 + condition

    for height, width in ((64, 64), (80, 200), (170, 64), (129, 131)):
        x, c = torch.randn(2, 3, height, width), torch.randn(2, 3, height, width)
        torch.testing.assert_close(sizes.tiled(predict, 64, 16, batch=4)(x, torch.tensor(0.5), c), x * 2 + c)
    assert max(s[0] for s in calls) <= 4 and max(s[-1] for s in calls) <= 64


def test_tiles_keep_the_jpeg_grid():
    seen = []

    def predict(sample, gamma, condition):
        seen.extend((condition[:, 0, 0, 0] % 8).tolist() + (condition[:, 1, 0, 0] % 8).tolist())
        return sample

    y, x = torch.meshgrid(torch.arange(208.0), torch.arange(304.0), indexing="ij")
    condition = torch.stack([y, x, y])[None]
    sizes.tiled(predict, 64, 16)(torch.zeros(1, 3, 208, 304), torch.tensor(0.5), condition)
    assert len(seen) > 20 and set(seen) == {0.0}
    with pytest.raises(ValueError, match="multiples of 16"):
        sizes.tiled(predict, 60, 16)


def test_chroma_comes_up_and_luma_stays():
    gray = torch.rand(1, 1, 90, 120).expand(1, 3, -1, -1) * 1.6 - 0.8
    view = sizes.fit(90, 120, 32, 4)
    sample = torch.zeros(1, 3, *view.outer)
    sample[:, 0] = 0.3
    out = sizes.merge_chroma(gray, chroma(sample), view)
    torch.testing.assert_close(luma(out), luma(gray), atol=1e-5, rtol=0)
    assert (out[:, 0] - out[:, 1] > 0.05).float().mean() > 0.95


def test_chroma_follows_the_photographs_edges():
    """Red on the left, gray on the right, one edge: brought up 8 times, the colour ends where the light does."""
    gray = torch.full((1, 3, 256, 256), -0.2)
    gray[..., 128:] = 0.5
    view = sizes.fit(256, 256, 32, 4)
    sample = torch.zeros(1, 3, 32, 32)
    sample[:, 0, :, :16] = 0.4
    out = sizes.merge_chroma(gray, chroma(sample), view)
    red = out[0, 0] - out[0, 1]
    assert (red[:, :126] > 0.3).all() and (red[:, 130:] < 0.1).all()
    plain = view.back(chroma(sample))
    assert (plain[0, 0] - plain[0, 1])[:, 130].mean() > 0.04 > red[:, 130].mean()  # what bleeding would be


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_extension_keeps_what_is_known_and_stays_in_range(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 3, height, width, generator=generator)
    known = (torch.rand(1, 1, height, width, generator=generator) < 0.3).float()
    known[..., 0, 0] = 1
    out = masks.extend(values, known)
    assert torch.equal(torch.where(known > 0, out, 0), torch.where(known > 0, values, 0))
    low, high = (f(torch.where(known > 0, values, fill)) for f, fill in ((torch.amin, 9.0), (torch.amax, -9.0)))
    assert low - 1e-5 <= out.min() and out.max() <= high + 1e-5


def test_seamless_meets_the_colours_around():
    """A fill that is too dark on one side and right on the other, over a slope: no step is left at the border."""
    slope = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 64, 64).contiguous()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    wrong = slope - 0.4 * torch.linspace(1, 0, 64)[:, None]
    out = masks.seamless(wrong, slope, mask)
    assert torch.equal(out * (1 - mask), slope * (1 - mask))
    before, after = ((x - slope)[..., 16:48, 16:48].abs() for x in (wrong, out))
    assert before.max() > 0.25 and after.max() < 0.05


def test_nothing_leaks_out_of_the_hole():
    image = torch.full((1, 3, 100, 100), 0.5)
    mask = torch.zeros(1, 1, 100, 100)
    mask[..., 33:61, 21:57] = 1
    image = torch.where(mask > 0, float("nan"), image)
    for view in sizes.fit(100, 100, 32, 4).levels(4):
        small, hole = view.look_known(image, mask)
        assert hole.any() and (small[(hole == 0).expand_as(small)] - 0.5).abs().max() < 1e-6
        assert torch.isfinite(small).all()
    assert view.inner == (100, 100)


@settings(max_examples=200, deadline=None)
@given(height=side, width=side)
def test_levels_rise_to_the_photographs_own_resolution(height, width):
    views = sizes.fit(height, width, 64, 8).levels(8)
    assert views[-1].inner == (height, width) or len(views) == 1 and views[0].inner == (height, width)
    for coarse, fine in zip(views, views[1:], strict=False):
        assert all(f <= 2.7 * c for f, c in zip(fine.inner, coarse.inner, strict=True))
        assert all(o % 8 == 0 and i <= o < max(i + 8, 17) for o, i in zip(fine.outer, fine.inner, strict=True))


def test_tiles_outside_the_hole_are_left_out():
    places = []

    def predict(sample, gamma, condition):
        places.append(sample.shape[0])
        return sample

    where = torch.zeros(1, 1, 256, 256)
    where[..., 100:110, 100:110] = 1
    x = torch.randn(1, 3, 256, 256)
    out = sizes.tiled(predict, 64, 16, where=where)(x, torch.tensor(0.5), x)
    assert sum(places) <= 4
    torch.testing.assert_close(out[..., 100:110, 100:110], x[..., 100:110, 100:110])


def test_larger_tiles_are_smaller_batches():
    """Tiles of 128 pixels, 32 at a time, took a third longer a pixel than 8 at a time."""
    shapes = []

    def predict(sample, gamma, condition):
        shapes.append(tuple(sample.shape))
        return sample

    x = torch.randn(2, 3, 400, 400)
    sizes.tiled(predict, 128, 16)(x, torch.tensor(0.5), x)
    assert max(s[0] for s in shapes) == 4 and sum(s[0] for s in shapes) == 2 * 16


def test_tiles_are_as_large_as_covers_the_hole_with_the_fewest_pixels():
    hole, scratch = torch.zeros(1, 1, 768, 768), torch.zeros(1, 1, 768, 768)
    hole[..., 1:, :] = 1
    scratch[0, 0, range(768), range(768)] = 1
    assert sizes.cheapest_tile(hole, 64, 8, 16) == 128 and sizes.cheapest_tile(scratch, 64, 8, 16) == 64
    assert sizes.cheapest_tile(hole, 128, 8, 16) == 128 and sizes.cheapest_tile(hole, 64, 64, 16) == 128
    assert sizes.cheapest_tile(hole[..., :90, :], 256, 8, 64) == 256  # what the network was trained at is not left
    assert sizes.cheapest_tile(hole[..., 80:170, 80:170], 64, 8, 16) == 96  # all of it in one


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 99))
def test_separate_holes_are_together_the_mask(height, width, seed):
    rng = np.random.default_rng(seed)
    mask = torch.zeros(1, 1, height, width)
    for _ in range(rng.integers(1, 5)):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[..., y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = 1
    holes = list(sizes.separate(mask))
    assert torch.equal(sum(holes), mask) and all(hole.any() for hole in holes)


@pytest.mark.parametrize("side", [129, 164, 1700, 3024, 3900])
def test_no_pixel_of_separate_holes_is_lost(side):
    mask = torch.zeros(1, 1, side, 40)
    mask[..., ::7, 3:9] = 1
    mask[..., side // 2 :, :] = 0
    mask[..., side - 5 :, 30:] = 1
    assert torch.equal(sum(sizes.separate(mask)), mask)


def test_thin_scratches_do_not_hide_the_picture():
    mask = (torch.rand(1, 1, 1500, 2000, generator=torch.Generator().manual_seed(0)) < 0.01).float()
    image = torch.full((1, 3, 1500, 2000), 0.3)
    small, hole = sizes.fit(1500, 2000, 64, 8).look_known(torch.where(mask > 0, -1.0, image), mask)
    assert not hole.any() and (small - 0.3).abs().max() < 1e-5


def test_holes_apart_are_separated_and_a_winding_one_is_not():
    mask = torch.zeros(1, 1, 1000, 1200)
    mask[..., 10:60, 20:40] = 1
    mask[..., 800:900, 1000:1100] = 1
    large, small = sizes.separate(mask)
    assert large.sum() == 100 * 100 and small.sum() == 50 * 20
    spiral = torch.zeros(1, 1, 64, 64)
    spiral[..., 8, 8:56] = spiral[..., 8:56, 55] = spiral[..., 55, 20:56] = spiral[..., 20:56, 20] = 1
    assert len(list(sizes.separate(spiral))) == 1


@pytest.mark.parametrize("sides", [dict(right=300), dict(left=70, top=90), dict(left=20, right=20, top=20, bottom=20)])
def test_rings_are_the_border_and_grow_outward(sides):
    """Together the border, none twice, each beside what is known by then, none wider than half of the short side."""
    height, width = 40 + sides.get("top", 0) + sides.get("bottom", 0), 60 + sides.get("left", 0) + sides.get("right", 0)
    mask = masks.border_mask(height, width, **sides)[None]
    known, total = 1 - mask, torch.zeros_like(mask)
    for ring in sizes.rings(mask):
        assert not (ring * known).any()
        reach = torch.nn.functional.max_pool2d(known, 41, stride=1, padding=20)
        assert (reach >= ring).all()
        known, total = known + ring, total + ring
    assert torch.equal(total, mask)


@pytest.mark.parametrize("size", [(100, 100), (150, 200), (333, 77), (300, 451)])
@pytest.mark.parametrize("aspect", [1.01, 4 / 3, 16 / 9, 9 / 16, 2.0, 3.0])
def test_aspect_is_reached(size, aspect):
    """To the pixel, and nothing is cut."""
    if size == (150, 200) and aspect == 4 / 3:
        with pytest.raises(ValueError, match="the picture is 200x150, which is aspect 1.333 already"):
            sizes.sides_for(size, aspect)
        return
    sides = sizes.sides_for(size, aspect)
    height, width = size[0] + sides["top"] + sides["bottom"], size[1] + sides["left"] + sides["right"]
    assert min(abs(width - height * aspect), abs(height - width / aspect)) <= 0.5
    assert min(sides.values()) == 0 and abs(sides["left"] - sides["right"]) <= 1 >= abs(sides["top"] - sides["bottom"])
    with pytest.raises(ValueError, match="aspect is -1"):
        sizes.sides_for(size, -1)


def test_grain_is_that_of_the_calm_places(seeded):
    """Noise of a known strength is found on a gradient with an edge, and none where there is none."""
    ramp = torch.linspace(-0.5, 0.5, 128).expand(1, 3, 128, 128).clone()
    ramp[..., 40:] += 0.3
    where = torch.ones(1, 1, 128, 128)
    noisy = ramp + 0.05 * torch.randn(1, 1, 128, 128, generator=seeded(1))
    assert sizes.grain(noisy, where).item() == pytest.approx(0.05, rel=0.15)
    assert sizes.grain(ramp, where).item() < 1e-3
    assert sizes.grain(noisy, where * 0).item() == 0
    within = sizes.grain(noisy, where).item()
    assert sizes.grain(torch.where(where > 0, noisy, 1.0), where).item() == within  # what lies beside has no part


def test_a_line_of_pixels_is_no_more_work_than_it_is_worth():
    inner = sizes.fit(1, 5000, 64, 8).inner
    assert inner[0] * inner[1] <= 20 * 64 * 64  # without the limit: 32 x 160000
    assert sizes.fit(100, 2000, 64, 8).inner[0] == 32  # a strip keeps its height
    assert sizes.fit(5000, 1, 64, 8).outer[1] == 16, "no level of the network is one pixel wide"


def test_what_is_smaller_than_a_cell_has_no_grain():
    assert sizes.grain(torch.rand(2, 3, 3, 70), torch.ones(1, 1, 3, 70)).tolist() == [[[[0.0]]]] * 2


def test_a_batch_that_memory_does_not_hold_is_halved():
    sizes_seen = []

    def narrow(sample, gamma, condition):
        sizes_seen.append(len(sample))
        if len(sample) > limit:
            torch.empty(2**60)  # the allocator's own refusal
        return sample * gamma + condition

    sample, condition, limit = torch.rand(7, 3, 8, 8), torch.rand(7, 3, 8, 8), 2
    out = sizes.halving(narrow)(sample, torch.tensor(0.5), condition)
    assert torch.equal(out, sample * 0.5 + condition) and sizes_seen == [7, 4, 2, 2, 3, 2, 1]
    limit = 0
    with pytest.raises(MemoryError, match="one evaluation of 8x8 pixels on cpu: a half-precision"):
        sizes.halving(narrow)(sample, torch.tensor(0.5), condition)
    with pytest.raises(RuntimeError, match="size"):  # another error is not taken for this one
        sizes.halving(lambda s, g, c: s + c[..., :3])(sample, torch.tensor(0.5), condition)


def test_specks_of_dust_are_not_sampled_one_by_one(seeded):
    mask = (torch.rand(1, 1, 300, 300, generator=seeded()) < 0.01).float()
    holes = list(sizes.separate(mask))
    assert 1 <= len(holes) <= sizes.MOST_HOLES and torch.equal(torch.stack(holes).sum(0), mask)


def test_specks_of_a_large_photograph_are_sampled_in_parts(seeded):
    mask = (torch.rand(1, 1, 300, 5000, generator=seeded()) < 0.001).float()
    holes = list(sizes.separate(mask))
    assert 2 <= len(holes) <= 4 and torch.equal(sum(holes), mask)
    spans = [torch.nonzero(hole[0, 0].any(0)).aminmax() for hole in holes]
    assert max(span.max - span.min for span in spans) < 2600, "none spans the photograph: memory stays bounded"


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("size", [(1, 1), (1472, 1473), (3000, 60), (1, 10_000), (2900, 4400)])
def test_blocks_cover_and_overlap(size, multiple):
    seen = torch.zeros(size, dtype=torch.uint8)
    for block in sizes.blocks(*size, multiple):
        seen[block.top : block.top + block.height, block.left : block.left + block.width] += 1
        assert max(block.outer) <= sizes.BLOCK + multiple and block.top % multiple == block.left % multiple == 0
        for length, whole in zip((block.height, block.width), size, strict=True):
            assert length > sizes.LAP or length == whole
    assert seen.all()
    if max(size) > 1472:
        assert (seen == 2).float().mean() < 0.12


def test_noise_at_a_position_is_the_same_in_every_block():
    seeds = [3, 2**61]
    whole = sizes.noise_at(seeds, 0, 0, (300, 260))
    assert torch.equal(sizes.noise_at(seeds, 70, 33, (200, 100)), whole[..., 70:270, 33:133])
    assert torch.equal(sizes.noise_at(seeds[1:], 0, 0, (300, 260))[0], whole[1])
    assert abs(whole.mean().item()) < 0.01 and whole.std().item() == pytest.approx(1, abs=0.01)
    cells = whole[..., :256, :256].unfold(2, 64, 64).unfold(3, 64, 64).reshape(2 * 3 * 16, 64 * 64)
    assert (torch.corrcoef(cells) - torch.eye(96)).abs().max() < 0.1  # no two alike


@pytest.mark.parametrize("size", [(200, 300), (171, 190), (101, 400)])
def test_a_part_of_what_is_enlarged(size, seeded):
    image = torch.rand(2, 3, 100, 150, generator=seeded())
    whole = sizes.resize(image, size)
    for top, left, height, width in ((0, 0, 40, 60), (37, 81, 60, 70), (size[0] - 30, size[1] - 50, 30, 50)):
        block = sizes.View(top, left, height, width, (height, width), (height, width))
        torch.testing.assert_close(sizes.enlarged(image, size, block), block.crop(whole), atol=2e-6, rtol=0)


def test_blocks_are_faded_into_each_other(monkeypatch):
    """What all blocks agree on comes out as it is; where two differ, no step is left."""
    monkeypatch.setattr(sizes, "BLOCK", 160)
    out, image = torch.zeros(1, 3, 260, 370), torch.rand(1, 3, 260, 370)
    blocks = sizes.blocks(260, 370, 16)
    for block in blocks:
        sizes.lay(out, block.crop(image), block)
    assert len(blocks) == 6 and torch.equal(out, image)
    for i, block in enumerate(blocks):
        sizes.lay(out, torch.full((1, 3, block.height, block.width), [0.0, 1.0, -1.0, 0.5][i % 4]), block)
    assert max(out.diff(dim=dim).abs().max() for dim in (-1, -2)) < 2.1 / sizes.LAP


def alternating(image):
    """How strong patterns of two pixels' period are that hold over 16: along rows, columns and both."""
    height, width = image.shape[-2:]
    rows, columns = 1 - 2.0 * (torch.arange(height) % 2)[:, None], 1 - 2.0 * (torch.arange(width) % 2)
    means = [F.avg_pool2d(image * sign, 16).abs().mean().item() for sign in (rows, columns, rows * columns)]
    return torch.tensor(means)


def test_a_grid_of_two_pixels_is_taken_out_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    plain = (y / 200 + (x > 70) * 0.4 - 0.4 + 0.1 * torch.sin(x / 3)).expand(2, 3, -1, -1)
    plain = plain + 0.02 * torch.randn(plain.shape, generator=generator)
    grid = 0.02 * (1 - 2 * (y % 2)) - 0.01 * (1 - 2 * (x % 2)) + 0.015 * (1 - 2 * ((x + y) % 2))
    hole = torch.zeros(1, 1, 96, 128)
    hole[..., 10:80, 20:110] = 1
    found = sizes.without_grid(plain + hole * grid, hole)
    assert torch.equal((found * (1 - hole)), (plain * (1 - hole)))
    inside = (..., slice(16, 64), slice(32, 96))
    before, after, never = (alternating(image[inside]) for image in (plain + grid, found, plain))
    assert (after < 0.3 * before).all() and (after < 1.5 * never + 1e-3).all()
    assert (found - plain)[inside].square().mean() < 0.1 * grid[inside[1:]].square().mean()


def test_strips_are_the_border_from_the_inside_out():
    sides = {"left": 10, "top": 3, "right": 1}
    mask = masks.border_mask(43, 71, **sides)[None]
    known, total = 1 - mask, torch.zeros_like(mask)
    for strip, within in sizes.strips(mask, 4):
        assert not (strip * known).any()
        reach = torch.nn.functional.max_pool2d(known, 9, stride=1, padding=4)
        assert (reach >= strip).all(), "no wider than 4"
        known, total = known + strip, total + strip
        assert known[within].all() and known.sum() == known[within].numel(), "all that is known lies within"
    assert torch.equal(total, mask)
