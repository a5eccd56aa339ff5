import numpy as np
import pytest
import torch
from PIL import Image

from palette_diffusers import canvas
from palette_diffusers.coefficients import read_coefficients


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
        with pytest.raises(ValueError, match="consistent needs the path"):
            pipe(image, consistent=True, **ask)
        pipe(image, **ask)
    with pytest.raises(ValueError, match="belongs to 'jpeg_restoration'"):
        pipe(path, task="colorization", consistent=True)


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
