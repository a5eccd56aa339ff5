"""Photographs of any size, mode and orientation: what holds for all of them, by a network that costs nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from palette_diffusers import canvas

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")
TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")
# mostly small ones, whose shape is what matters; one long side now and then
shapes = st.one_of(
    st.tuples(st.integers(1, 130), st.integers(1, 130)),
    st.tuples(st.integers(1, 40), st.integers(1, 3000)),
    st.tuples(st.integers(1, 3000), st.integers(1, 40)),
)
orientations = st.integers(1, 8)


def drawn(mode: str, height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).convert(mode)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if mode == "PA":
        return image.convert("L").convert("LA").convert("PA")
    return image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)


@pytest.fixture(scope="module")
def mend():
    from conftest import toy_unet

    from palette_diffusers import PalettePipeline, PaletteScheduler

    pipe = PalettePipeline(toy_unet(), PaletteScheduler(sampling_spacing="logsnr"), default_steps=2)
    pipe.set_progress_bar_config(disable=True)
    pipe._predict = lambda sample, gamma, condition: 0.7 * sample - 0.2 * condition[:, :3]

    def call(image, task, **options):
        return pipe(image, task=task, generator=torch.Generator().manual_seed(0), **options).images[0]

    return call


def tagged(image: Image.Image, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image._exif = None
    return image


@settings(max_examples=120, deadline=None)
@given(shape=shapes, mode=st.sampled_from(MODES), orientation=orientations, seed=st.integers(0, 99))
def test_what_is_read_is_upright_and_comes_back(shape, mode, orientation, seed):
    """As Pillow itself turns and converts it, to the bit where that is of 8 bits or gray of 16."""
    image = drawn(mode, *shape, seed)
    upright = ImageOps.exif_transpose(tagged(image.copy(), orientation))
    picture = canvas.read(tagged(image, orientation))
    assert picture.size == upright.size[::-1] == (shape if orientation < 5 else shape[::-1])
    assert picture.image.abs().max() <= 1 and (picture.alpha is not None) == (mode in ("LA", "PA", "RGBA"))
    out = canvas.to_pil(picture.image, picture)
    assert out.getexif().get(0x0112, 1) == 1
    if mode == "I;16":
        assert np.array_equal(np.asarray(out), np.asarray(upright))
    elif mode not in ("I", "F"):
        assert np.array_equal(np.asarray(out), np.asarray(upright.convert("RGB" if picture.alpha is None else "RGBA")))
    elif np.asarray(upright).max() > 1:  # else 1 is white
        assert np.array_equal(np.asarray(out), np.asarray(upright.convert("L").convert("RGB")))


@settings(max_examples=25, deadline=None)
@given(shape=shapes, mode=st.sampled_from(MODES), task=st.sampled_from(TASKS), orientation=orientations, data=st.data())
def test_size_and_known_pixels_are_kept(mend, shape, mode, task, orientation, data):
    image = tagged(drawn(mode, *shape, 0), orientation)
    known = canvas.to_pil(canvas.read(image).image, canvas.read(image))
    width, height = known.size
    options, box = {}, (0, 0, width, height)
    if task == "inpainting":
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        hole = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
        options = {"mask_image": ",".join(map(str, hole))}
        if hole == (0, 0, width, height):
            with pytest.raises(ValueError, match="the mask is full"):
                mend(image, task, **options)
            return
    elif task == "uncropping":
        sides = {side: data.draw(st.integers(0, 40)) for side in ("left", "right", "top", "bottom")}
        options, box = sides, (sides["left"], sides["top"], sides["left"] + width, sides["top"] + height)
        if not any(sides.values()):
            with pytest.raises(ValueError, match="are all zero"):
                mend(image, task, **options)
            return
        width, height = width + sides["left"] + sides["right"], height + sides["top"] + sides["bottom"]
    result = mend(image, task, **options)
    assert result.size == (width, height)
    if task in ("inpainting", "uncropping"):
        before, after = np.asarray(known), np.asarray(result.crop(box))
        assert result.mode == known.mode
        same = (before == after).reshape(*before.shape[:2], -1).all(-1)
        if task == "inpainting":
            same[hole[1] : hole[3], hole[0] : hole[2]] = True
        assert same.all()


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_colour_comes_up_to_any_size(mend, height, width):
    """Luma is the photograph's own, within rounding, wherever its corner lies."""
    gray = np.add.outer(np.arange(height) % 200, np.arange(width) % 50).astype(np.uint8)
    result = np.asarray(mend(gray, "colorization"))
    assert result.shape == (height, width, 3)
    light = result[::37, ::31].astype(float) @ (0.299, 0.587, 0.114)
    assert np.abs(light - gray[::37, ::31]).max() < 1.01
