import io

import numpy as np
import pytest
import torch
from PIL import Image

from palette_diffusers import Task, get_task, register_task
from palette_diffusers.color import chroma, is_gray, luma, with_luma
from palette_diffusers.masks import (
    SIDES,
    border_mask,
    center_mask,
    free_form_mask,
    numpy_generator,
    rectangle_mask,
    uncropping_mask,
)
from palette_diffusers.tasks import Given, jpeg, network_condition, task_names


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def clean_image(seed=0, size=64):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("draw", [free_form_mask, rectangle_mask])
def test_mask_areas(draw):
    areas = torch.stack([draw(64, 48, g).mean() for g in generators(300)])
    assert 0.1 <= areas.min() and areas.max() <= 0.4
    assert areas.min() < 0.15 and areas.max() > 0.35 and areas.std() > 0.04
    areas = torch.stack([draw(64, 64, g, area=(0.2, 0.3)).mean() for g in generators(100)])
    assert 0.195 <= areas.min() and areas.max() <= 0.305


def test_masks_are_binary_seeded_and_shaped():
    for draw in (free_form_mask, rectangle_mask, uncropping_mask):
        mask = draw(40, 70, torch.Generator().manual_seed(3))
        assert mask.shape == (1, 40, 70) and set(mask.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(mask, draw(40, 70, torch.Generator().manual_seed(3)))
    masks = {free_form_mask(64, 64, g).numpy().tobytes() for g in generators(50)}
    assert len(masks) == 50


def test_free_form_covers_the_picture_evenly():
    mean = torch.stack([free_form_mask(64, 64, g) for g in generators(600)]).mean((0, 1))
    halves = [mean[:32].mean(), mean[32:].mean(), mean[:, :32].mean(), mean[:, 32:].mean()]
    assert max(halves) - min(halves) < 0.05


def test_uncropping_masks_the_border():
    counts = dict.fromkeys((*SIDES, "all"), 0)
    for g in generators(800):
        mask = uncropping_mask(64, 64, g)[0]
        assert mask.mean().item() == pytest.approx(0.5, abs=0.02)
        kept = torch.nonzero(mask == 0)
        (top, left), (bottom, right) = kept.min(0).values.tolist(), kept.max(0).values.tolist()
        assert (bottom - top + 1) * (right - left + 1) == len(kept)  # what is kept is one rectangle
        sides = dict(left=left > 0, right=right < 63, top=top > 0, bottom=bottom < 63)
        assert sum(sides.values()) in (1, 4)
        counts["all" if all(sides.values()) else next(k for k, v in sides.items() if v)] += 1
    assert counts["all"] / 800 == pytest.approx(0.5, abs=0.06)
    assert min(counts[s] for s in SIDES) > 60


def test_inpainting_is_60_percent_free_form():
    """Rectangles have edges that are straight and axis-parallel: a row profile of few distinct values."""
    boxes = 0
    for g in generators(500):
        free = torch.rand((), generator=torch.Generator().manual_seed(g.initial_seed())).item() < 0.6
        mask = get_task("inpainting").draw_mask(64, 64, g)[0].numpy()
        changes = np.abs(np.diff(mask, axis=0)).any(1).sum()
        boxes += not free
        if not free:
            assert changes <= 10  # at most five rectangles
    assert boxes / 500 == pytest.approx(0.4, abs=0.06)


def test_border_and_center():
    assert border_mask(10, 20, right=5).sum() == 50
    assert center_mask(64, 64).mean().item() == 0.25
    with pytest.raises(ValueError, match="leaves nothing"):
        border_mask(10, 10, left=5, right=5)
    with pytest.raises(ValueError, match="negative"):
        border_mask(10, 10, left=-1)
    with pytest.raises(ValueError, match="area"):
        free_form_mask(8, 8, area=(0.5, 0.2))
    with pytest.raises(ValueError, match="0x4"):
        rectangle_mask(4, 0)


def test_inpainting_hides_the_hole_and_keeps_the_rest():
    image = clean_image()
    given = get_task("inpainting").degrade(image, torch.Generator().manual_seed(0))
    hole = given.mask.expand_as(image) > 0.5
    assert torch.equal(given.condition[~hole], image[~hole])
    assert given.condition[hole].std().item() == pytest.approx(1, abs=0.1)
    assert not torch.isclose(given.known[hole], image[hole]).all() and not given.known[hole].any()
    sample = torch.randn(1, 3, 64, 64) * 3
    out = get_task("inpainting").compose(sample, given)
    assert torch.equal(out[~hole], image[~hole]) and out.abs().max() <= 1


def test_nan_under_the_hole_does_no_harm():
    image = clean_image()
    mask = center_mask(64, 64)[None]
    image[..., 30, 30] = float("nan")
    given = get_task("inpainting").prepare(image, mask, torch.Generator().manual_seed(0))
    assert torch.isfinite(given.condition).all() and torch.isfinite(given.known).all()


def test_colorization_keeps_the_luma():
    image = clean_image()
    given = get_task("colorization").degrade(image)
    assert is_gray(given.condition).all()
    torch.testing.assert_close(luma(given.condition), luma(image))
    out = get_task("colorization").compose(clean_image(1) * 1.5, given)
    torch.testing.assert_close(luma(out), luma(image), atol=1e-5, rtol=0)
    assert out.abs().max() <= 1 + 1e-6 and not is_gray(out).any()


def test_chroma_out_of_gamut_keeps_its_hue():
    light, color = torch.tensor([0.8]).view(1, 1, 1, 1), chroma(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1))
    out = with_luma(light, color)
    torch.testing.assert_close(luma(out), light)
    ratio = chroma(out).flatten() / color.flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["inpainting", "jpeg_restoration"])
def test_gray_stays_gray(name):
    gray = luma(clean_image()).expand(1, 3, -1, -1)
    given = get_task(name).degrade(gray, torch.Generator().manual_seed(0))
    assert is_gray(get_task(name).compose(clean_image(1), given)).all()
    given = get_task(name).degrade(clean_image(2), torch.Generator().manual_seed(0))
    assert not is_gray(get_task(name).compose(clean_image(1), given)).any()


def test_jpeg_qualities(monkeypatch):
    drawn = []

    def spy(self, *args, **options):
        drawn.append(options["quality"])
        return original(self, *args, **options)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", spy)
    for g in generators(2000):
        get_task("jpeg_restoration").degrade(clean_image(size=8), g)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.min() == 5 and values.max() == 30
    weights = np.exp(-np.arange(5, 31) / 10)
    expected = (weights / weights.sum() * np.arange(5, 31)).sum()
    assert np.mean(drawn) == pytest.approx(expected, abs=0.5)


def test_jpeg_is_pillows():
    image = clean_image(size=32)
    pixels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=10, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer))
    out = ((jpeg(image, 10)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(out, expected)


def test_own_task():
    @register_task
    class Mirror(Task):
        name = "mirror"

        def degrade(self, clean, generator=None):
            return self.prepare(clean.flip(-1))

    image = clean_image()
    assert torch.equal(get_task("mirror").degrade(image).condition, image.flip(-1))
    with pytest.raises(ValueError, match="expected one of .*colorization"):
        get_task("colorise")
    with pytest.raises(TypeError, match="name"):
        register_task(Task())
    with pytest.raises(NotImplementedError, match="Task must define degrade"):
        Task().degrade(image)
    with pytest.raises(ValueError, match="needs a mask"):
        get_task("inpainting").prepare(image)


@pytest.mark.parametrize("name", ["colorization", "inpainting", "uncropping", "jpeg_restoration", "paired"])
def test_tasks_stay_on_the_device(name):
    """On the meta device, as on an accelerator, a tensor of another device is an error."""
    clean = torch.rand(1, 3, 32, 32)
    task = get_task(name)
    given = task.prepare(clean) if name == "paired" else task.degrade(clean, torch.Generator().manual_seed(0))
    sample = torch.rand(1, 3, 32, 32, device="meta")
    with pytest.raises(RuntimeError):
        sample + given.known
    there = given.to("meta")
    assert task.guide(sample, there).device.type == "meta"
    mask = None if given.mask is None else there.mask
    for moved in (there, task.prepare(clean.to("meta"), mask, torch.Generator())):
        assert moved.known.device.type == moved.condition.device.type == "meta"
        assert moved.mask is None or moved.mask.device.type == "meta"


def test_gray_sources_may_have_coloured_targets():
    gray = torch.full((1, 3, 8, 8), 0.1)
    sample = torch.rand(1, 3, 8, 8)
    given = get_task("paired").prepare(gray)
    assert torch.equal(get_task("paired").compose(sample, given), sample)
    assert torch.equal(get_task("paired").compose(sample * 9 - 4, given), (sample * 9 - 4).clamp(-1, 1))
    with pytest.raises(ValueError, match="source_column"):
        get_task("paired").degrade(gray)


def test_what_the_network_is_told_of_holes():
    """Noise in the hole (the paper), or a smooth fill and the hole as one more channel; without a hole, zeros."""
    clean = torch.full((1, 3, 32, 32), 0.25)
    given = get_task("inpainting").degrade(clean, torch.Generator().manual_seed(0))
    assert network_condition(given, False) is given.condition
    told = network_condition(given, True)
    assert torch.equal(told[:, 3:], given.mask)
    torch.testing.assert_close(told[:, :3], clean)  # a plain picture, continued
    fill = torch.full((1, 3, 32, 32), -0.5)
    told = network_condition(given, True, fill)
    hole = given.mask.expand(-1, 3, -1, -1) > 0
    assert (told[:, :3][hole] == -0.5).all() and (told[:, :3][~hole] == 0.25).all()
    gray = get_task("colorization").degrade(clean)
    assert network_condition(gray, True).shape == (1, 4, 32, 32)
    assert torch.equal(network_condition(gray, True)[:, :3], gray.condition)
    assert not network_condition(gray, True)[:, 3].any()


@pytest.mark.parametrize("name", ["inpainting", "uncropping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_hole_is_drawn_by_the_seed_in_the_pictures_shape_and_dtype(name, dtype, seeded):
    task, image = get_task(name), clean_image(size=64)[..., :40].to(dtype)
    given, again = (task.degrade(image, seeded(3)) for _ in range(2))
    assert torch.equal(given.condition, again.condition) and torch.equal(given.mask, again.mask)
    assert not torch.equal(given.mask, task.degrade(image, seeded(4)).mask)
    assert given.mask.shape == (1, 1, 64, 40)
    assert given.known.dtype == given.condition.dtype == given.mask.dtype == dtype
    generator = seeded(3)
    mask = task.draw_mask(64, 40, generator)[None].to(dtype)
    expected = task.prepare(image, mask, generator)
    assert torch.equal(expected.condition, given.condition) and torch.equal(expected.mask, given.mask)


def test_half_a_hole_is_none(seeded):
    """White generates, and gray from the middle down keeps, as where a mask is read."""
    image, mask = clean_image(), torch.full((1, 1, 64, 64), 0.5)
    mask[..., 9:20, 9:20] = 0.51
    given = get_task("inpainting").prepare(image, mask, seeded())
    assert given.mask.sum() == 121 and given.mask[..., 9:20, 9:20].all()
    soft = Given(image, image, mask)
    assert torch.equal(get_task("inpainting").guide(image * 0, soft)[..., :9, :], image[..., :9, :])
    assert not get_task("inpainting").guide(image * 0, soft)[..., 9:20, 9:20].any()


def test_a_fill_out_of_range_counts_as_its_limit(seeded):
    """Before its colours are shifted to those around, and after."""
    given = get_task("inpainting").degrade(clean_image(), seeded())
    sample = clean_image(1) * 3
    out = get_task("inpainting").compose(sample, given)
    assert torch.equal(out, get_task("inpainting").compose(sample.clamp(-1, 1), given)) and out.abs().max() <= 1
    hole = given.mask.expand_as(out) > 0
    assert out[hole].std() > 0.5
    wanted = get_task("inpainting").guide(sample, given)
    assert torch.equal(wanted, torch.where(hole, sample.clamp(-1, 1), given.known))


def test_qualities_and_subsampling_are_by_the_seed(seeded):
    """Both kinds of subsampling appear, and a seed means one picture."""
    image = clean_image(size=32)
    task = get_task("jpeg_restoration")
    kinds = set()
    for seed in range(30):
        known = task.degrade(image, seeded(seed)).known
        assert torch.equal(known, task.degrade(image, seeded(seed)).known)
        rng = numpy_generator(seeded(seed))
        weights = np.exp(-np.arange(5, 31) / 10)
        quality, sampling = int(rng.choice(np.arange(5, 31), p=weights / weights.sum())), rng.random() < 0.75
        kinds.add(sampling)
        assert torch.equal(known, jpeg(image, quality, "4:2:0" if sampling else "4:4:4"))
    assert kinds == {True, False}
    assert jpeg(image.half(), 30).dtype == torch.float16


def test_several_given_are_one_batch(seeded):
    for name in ("inpainting", "colorization"):
        some = [get_task(name).degrade(clean_image(i), seeded(i)) for i in range(3)]
        together = Given.cat(some)
        for i, given in enumerate(some):
            assert torch.equal(together.known[i : i + 1], given.known)
            assert torch.equal(together.condition[i : i + 1], given.condition)
            assert (together.mask is None) == (name == "colorization")
            assert given.mask is None or torch.equal(together.mask[i : i + 1], given.mask)


def test_names_of_tasks():
    assert task_names()[:4] == ["colorization", "inpainting", "uncropping", "jpeg_restoration"]
    assert get_task(get_task("inpainting")) is get_task("inpainting")
    with pytest.raises(TypeError, match="a Task with a name like 'my_task' was expected, got .* with name 'no name'"):

        class Unnamed(Task):
            name = "no name"

        register_task(Unnamed)
