import io

import numpy as np
import pytest
import torch
from PIL import Image

from palette_diffusers import PalettePipeline, canvas
from palette_diffusers import coefficients as coefficients_module
from palette_diffusers.coefficients import find_coefficients, read_coefficients, shown_coefficients


def saved(tmp_path, photo, **options):
    Image.fromarray(photo).save(tmp_path / "a.jpg", **options)
    return tmp_path / "a.jpg"


def planes(image: Image.Image, tmp_path, like) -> list[torch.Tensor]:
    """The quantised coefficients of a picture saved by libjpeg with the tables of another JPEG."""
    options = dict(qtables=like.quantization, subsampling=0 if like.layer[0][1] == 1 else 2)
    image.save(tmp_path / "again.jpg", **options)
    return [plane.levels for plane in read_coefficients(tmp_path / "again.jpg").planes]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [5, 20, 60])
def test_a_projected_picture_is_stored_as_the_same_coefficients(photo, tmp_path, quality, subsampling):
    """libjpeg itself is asked, of a picture that is blurred and rounded to 8 bits."""
    path = saved(tmp_path, photo, quality=quality, subsampling=subsampling)
    coefficients = read_coefficients(path)
    blurred = torch.nn.functional.avg_pool2d(canvas.read(path).image, 5, 1, 2, count_include_pad=False)
    wrong = []
    with Image.open(path) as file:
        for image in (blurred, coefficients.project(blurred)):
            found = planes(canvas.to_pil(image), tmp_path, file)
            pairs = zip(found, coefficients.planes, strict=True)
            wrong.append(sum((levels != plane.levels)[plane.sure].sum().item() for levels, plane in pairs))
    assert wrong[0] > 100 and wrong[1] < 0.06 * wrong[0]
    assert (coefficients.project(canvas.read(path).image) - canvas.read(path).image).abs().max() < 1.5 / 127.5


def test_other_sampling_and_gray_hold_luma_alone(photo, tmp_path):
    assert len(read_coefficients(saved(tmp_path, photo, subsampling="4:2:2")).planes) == 1
    gray = read_coefficients(saved(tmp_path, photo[..., 0], quality=30))
    assert len(gray.planes) == 1 and gray.planes[0].levels.shape == (18, 25, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_held_in_the_grid_of_its_file(photo, tmp_path, orientation):
    """Sides are no multiple of 8: a grid from the upright corner would be off, and the decoded file moved."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, photo[:147, :195], quality=10, exif=exif)
    upright = canvas.read(path).image
    assert (read_coefficients(path).project(upright) - upright).abs().max() < 1.5 / 127.5


def test_bands_go_and_edges_stay(tmp_path):
    """A slope beside an edge at quality 10: smoother and nearer to what it was, the edge as steep."""
    slope = np.tile(np.linspace(60, 110, 192), (96, 1))
    slope[:, 150:] += 100
    path = saved(tmp_path, slope.round().astype(np.uint8), quality=10)
    before, coefficients = canvas.read(path).image, read_coefficients(path)
    after = coefficients.smooth(before)
    want = canvas.read(slope.round().astype(np.uint8)).image
    errors = [(x - want)[..., 16:-16, :140].square().mean().sqrt().item() for x in (before, after)]
    assert errors[1] < 0.7 * errors[0]
    steps = [(x[..., 48, 152] - x[..., 48, 147]).mean().item() for x in (before, after)]
    assert steps[1] > 0.9 * steps[0] > 0.5
    assert torch.allclose(coefficients.project(after), after, atol=0.5 / 127.5)


@pytest.mark.parametrize("quality", [30, 75])
def test_texture_stays_crisp_where_a_sample_is_soft(tmp_path, monkeypatch, quality):
    """Held to the middles of the intervals, a blurred picture is nearer to the original than anywhere within them, and
    about as sharp as the file; what lies in blocks without texture is the same."""
    coefficients = read_coefficients(saved(tmp_path, cat(), quality=quality))
    clean = canvas.read(cat()).image
    blurred = torch.nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False)
    narrow = coefficients.smooth(blurred)
    monkeypatch.setattr(coefficients_module, "NARROWED", torch.ones(8, 8))
    wide = coefficients.smooth(blurred)
    errors = [(image - clean).square().mean() for image in (narrow, wide)]
    assert errors[0] < 0.97 * errors[1]
    sharp = [image.diff(dim=-1).abs().mean() for image in (narrow, wide, canvas.read(tmp_path / "a.jpg").image)]
    assert 1.02 * sharp[1] < sharp[0] < 1.1 * sharp[2]
    flat = read_coefficients(saved(tmp_path, np.full((64, 64, 3), 77, np.uint8), quality=quality))
    image = torch.full((1, 3, 64, 64), 0.4)
    assert torch.equal(flat.smooth(image), (monkeypatch.undo(), flat.smooth(image))[1])


def test_what_has_no_coefficients_is_refused(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is no JPEG"):
        read_coefficients(tmp_path / "a.png")
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="JPEG of 4 inks"):
        read_coefficients(tmp_path / "b.jpg")
    Image.fromarray(photo).save(tmp_path / "c.jpg", keep_rgb=True)
    with pytest.raises(ValueError, match="in RGB"):
        read_coefficients(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="another size"):
        read_coefficients(saved(tmp_path, photo)).project(torch.zeros(1, 3, 40, 40))


def test_the_pipeline_holds_a_file_to_its_coefficients(pipe, photo, tmp_path):
    """By default where there are some; a network of random weights would leave them."""
    photo = photo[:64, :80]
    path = saved(tmp_path, photo, quality=20)
    ask = dict(task="jpeg_restoration", output_type="pt")
    free, held = (
        pipe(path, generator=torch.Generator().manual_seed(0), consistent=c, **ask).images for c in (False, None)
    )
    coefficients = read_coefficients(path)
    moved = [(coefficients.project(image) - image).abs().mean() * 127.5 for image in (free, held)]
    assert moved[0] > 2 and moved[1] < 0.1 * moved[0]
    for image in (photo, Image.fromarray(photo)):
        with pytest.raises(ValueError, match="consistent needs a JPEG file, or a picture that shows the blocks of one"):
            pipe(image, consistent=True, **ask)
        pipe(image, **ask)
    with pytest.raises(ValueError, match="belongs to 'jpeg_restoration'"):
        pipe(path, task="colorization", consistent=True)


def cat() -> np.ndarray:
    from skimage import data

    return data.chelsea()[40:232, 80:304]


def once(pixels: np.ndarray, quality: int) -> Image.Image:
    """What a JPEG shows."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")


@pytest.mark.parametrize("begin", [(0, 0), (5, 3)])
@pytest.mark.parametrize(("first", "last"), [(10, 95), (10, 75), (30, 90), (50, 92), (20, None)])
def test_a_jpeg_that_was_saved_again_is_held_to_what_it_was(tmp_path, first, last, begin):
    """Saved at a higher quality, or as PNG, cropped in between or not; what was there before the first agrees."""
    whole, (y, x) = cat(), ((8 - place) % 8 for place in begin)
    crop, original = once(whole, first).crop((x, y, 224, 192)), whole[y:, x:]
    path = tmp_path / ("a.jpg" if last else "a.png")
    crop.save(path, **({"quality": last} if last else {}))
    found = find_coefficients(canvas.read(path))
    assert abs(found.earlier - first) <= 1 and found.planes[0].begin == begin and len(found.planes) == 3
    assert found.planes[0].sure.float().mean() > 0.9
    clean, now = canvas.read(original).image, canvas.read(path).image
    moved = [(found.project(image) - image).abs().mean().item() for image in (clean, now)]
    assert (now - clean).abs().mean() > 0.02 and moved[0] < 0.1 * (now - clean).abs().mean() and moved[1] < 0.01


@pytest.mark.parametrize("middle", [50, 75, 85, 95])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_the_worst_of_several_jpegs_is_found(tmp_path, middle, kind):
    """One of quality 10, cropped, saved again at a higher one, and once more: almost all blocks are held to it."""
    path, crop = tmp_path / f"a.{kind}", once(cat(), 10).crop((3, 5, 224, 192))
    once(np.asarray(crop), middle).save(path, **({"quality": 97} if kind == "jpg" else {}))
    found = find_coefficients(canvas.read(path))
    assert found.earlier == 10 and found.planes[0].begin == (3, 5)
    assert found.planes[0].sure.float().mean() > 0.9
    clean = canvas.read(cat()[5:, 3:]).image
    assert (found.project(clean) - clean).abs().mean() < 0.01


def test_gray_of_16_bits_stays(pipe, tmp_path):
    levels = np.asarray(once(cat(), 10).convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert find_coefficients(canvas.read(tmp_path / "a.png")).earlier == 10
    seed = torch.Generator().manual_seed(0)
    assert pipe(tmp_path / "a.png", task="jpeg_restoration", generator=seed).images[0].mode == "I;16"


@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270])
@pytest.mark.parametrize(("first", "last"), [(10, 95), (15, 85), (30, None), (50, None)])
def test_pixels_that_were_turned_since(tmp_path, turn, first, last):
    """As programs do that apply a telephone's orientation: rows of frequencies are columns then."""
    turned, original = (Image.fromarray(one).transpose(turn) for one in (np.asarray(once(cat(), first)), cat()))
    path = tmp_path / ("a.jpg" if last else "a.png")
    turned.save(path, **({"quality": last} if last else {}))
    found = find_coefficients(canvas.read(path))
    assert found.earlier == first and found.planes[0].sure.float().mean() > 0.9
    clean, now = canvas.read(original).image, canvas.read(path).image
    assert (found.project(clean) - clean).abs().mean() < 0.1 * (now - clean).abs().mean()


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_photograph_that_was_cropped_before(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    crop = once(cat(), 15).crop((3, 6, 224, 192))
    crop.save(tmp_path / "a.jpg", quality=90, exif=exif)
    found, upright = read_coefficients(tmp_path / "a.jpg"), canvas.read(tmp_path / "a.jpg").image
    assert found.earlier == 15 and found.planes[0].begin == (2, 5)
    assert (found.project(upright) - upright).abs().mean() < 0.015


@pytest.mark.parametrize("quality", [None, 30, 75, 95])
def test_no_earlier_jpeg_is_seen_where_there_was_none(tmp_path, quality):
    """Photographs; one that was resized since; a flat picture, a ramp, noise, lines of print."""
    from skimage import data

    small = once(cat(), 10).resize((180, 154), Image.Resampling.LANCZOS)
    ramp = np.repeat(np.arange(0, 256, 2, np.uint8)[:, None], 128, 1)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    flat = np.full((96, 96, 3), (40, 80, 99), np.uint8)
    for picture in (cat(), data.astronaut()[:256, :256], small, ramp, noise, flat, data.checkerboard()):
        if quality is None:
            image = canvas.read(np.asarray(picture)).image
            assert shown_coefficients(image) is None
        else:
            assert read_coefficients(saved(tmp_path, np.asarray(picture), quality=quality)).earlier is None


def test_a_jpeg_that_was_saved_again_is_mended(tmp_path):
    """By the starter: blocks go as they go of the first file. Held to the last one they would stay."""
    pipe = PalettePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    pixels = cat()[:96, :96]
    saved(tmp_path, pixels, quality=10).rename(tmp_path / "once.jpg")
    Image.open(tmp_path / "once.jpg").save(tmp_path / "again.jpg", quality=95)
    Image.open(tmp_path / "once.jpg").crop((3, 5, 96, 96)).save(tmp_path / "cropped.png")

    def blocks(name: str, mend: bool = True, **options) -> float:
        """By how much neighbours differ more where the first file's blocks meet."""
        image = Image.open(tmp_path / name).convert("RGB")
        if mend:
            seed = torch.Generator().manual_seed(0)
            image = pipe(tmp_path / name, task="jpeg_restoration", generator=seed, **options).images[0]
        across = np.abs(np.diff(np.asarray(image.convert("L"), float)[-88:, -88:], axis=1)).mean(0)
        return across[7::8].mean() - np.delete(across, np.s_[7::8]).mean()

    before, best = blocks("once.jpg", False), blocks("once.jpg")
    assert best < 0.3 * before
    for name in ("again.jpg", "cropped.png"):
        assert abs(blocks(name)) < 0.3 * before


@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_smoothing_in_bands_is_smoothing_at_once(tmp_path, monkeypatch, seeded, orientation):
    pixels = np.add.outer(np.arange(600), np.arange(70) * 3) // 12 + np.random.default_rng(0).integers(0, 9, (600, 70))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, pixels.astype(np.uint8), quality=10, exif=exif)
    coefficients, image = read_coefficients(path), canvas.read(path).image
    whole = coefficients.smooth(image)
    monkeypatch.setattr("palette_diffusers.coefficients.ROWS", 256)
    assert torch.equal(coefficients.smooth(image), whole) and not torch.equal(whole, image)
