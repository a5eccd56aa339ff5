import io

import numpy as np
import pytest
import torch
from PIL import Image

from palette_diffusers import canvas


def png(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_reading_and_writing_are_inverse(photo):
    assert np.array_equal(canvas.to_uint8(canvas.read(photo).image), photo)
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(canvas.to_uint8(canvas.read(every).image)[..., 0], every)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode(mode, photo):
    if mode == "I;16":
        image = Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(photo).convert("L" if mode in ("I", "F", "LA") else "RGB").convert(mode)
    picture = canvas.read(image)
    assert picture.size == photo.shape[:2] and picture.image.abs().max() <= 1
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    expected = np.asarray(image.convert("RGB")) if mode not in ("I;16", "I", "F") else photo[..., :1].repeat(3, -1)
    if mode in ("RGB", "RGBA", "CMYK", "P", "I;16"):
        assert np.abs(canvas.to_uint8(picture.image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    turned = png(tmp_path, Image.fromarray(photo), "a.jpg", exif=exif, quality=95)
    picture = canvas.read(turned)
    height, width = photo.shape[:2]
    assert picture.size == ((height, width) if orientation < 5 else (width, height))
    out = canvas.to_pil(picture.image, picture)
    canvas.save(out, tmp_path / "b.png")
    again = Image.open(tmp_path / "b.png")
    assert again.size == out.size and again.getexif().get(0x0112, 1) == 1 and again.getexif()[0x010F] == "Maker"


def test_profile_and_alpha_are_carried(photo, tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(photo).convert("RGBA")
    image.putalpha(Image.fromarray(photo[..., 0]))
    picture = canvas.read(png(tmp_path, image, icc_profile=profile))
    canvas.save(canvas.to_pil(picture.image, picture), tmp_path / "b.png")
    again = Image.open(tmp_path / "b.png")
    assert again.info["icc_profile"] == profile
    assert np.array_equal(np.asarray(again), np.asarray(image))


def test_bad_files(tmp_path, photo):
    with pytest.raises(FileNotFoundError, match="no such file"):
        canvas.read(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        canvas.read(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="is empty"):
        canvas.read(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not an image"):
        canvas.read(tmp_path / "text.png")
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        canvas.read(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="the limit is 1000"):
        canvas.read(Image.fromarray(photo), max_pixels=1000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.full((3, 4, 4), float("nan")), "not finite"),
        (torch.full((3, 4, 4), 2.0), "expected -1 to 1"),
        (torch.zeros(4, 4), "expected \\(3, H, W\\)"),
        (torch.zeros(2, 4, 4), "expected \\(3, H, W\\)"),
        (np.full((4, 4), 1.5), "expected 0 to 1"),
        (np.zeros((4, 4, 2)), "expected \\(H, W\\)"),
        (np.zeros((0, 4, 3)), "expected \\(H, W\\)"),
    ],
)
def test_bad_arrays(source, message):
    with pytest.raises(ValueError, match=message):
        canvas.read(source)


def test_bad_types():
    with pytest.raises(TypeError, match="int"):
        canvas.read(3)
    with pytest.raises(TypeError, match="int64"):
        canvas.read(np.zeros((4, 4), np.int64))
    with pytest.raises(ValueError, match="list of images is empty"):
        canvas.read_list([])


def test_masks():
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 255
    assert canvas.read_mask(mask, (4, 6)).sum() == 1
    with pytest.raises(ValueError, match="mask is 6x4, the image 4x6"):
        canvas.read_mask(mask, (6, 4))
    with pytest.raises(ValueError, match="empty"):
        canvas.read_mask(mask * 0, (4, 6))
    with pytest.raises(ValueError, match="full"):
        canvas.read_mask(mask * 0 + 255, (4, 6))


def test_nothing_half_written(tmp_path, photo, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def full(self, stream, *args, **options):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        canvas.save(Image.fromarray(photo), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"
    with pytest.raises(ValueError, match="suffix"):
        canvas.save(Image.fromarray(photo), tmp_path / "a.xyz")


def test_a_mask_may_be_as_large_as_its_picture(monkeypatch):
    monkeypatch.setattr(canvas, "MAX_PIXELS", 100)
    pixels = np.zeros((20, 30), np.uint8)
    pixels[3, 4] = 255
    assert canvas.read_mask(Image.fromarray(pixels), (20, 30)).sum() == 1
    with pytest.raises(ValueError, match="30x20, 600 pixels: the limit is 100"):
        canvas.read_mask(Image.fromarray(pixels), (5, 5))


def test_masks_in_words(photo):
    """By transparency, by the colour that was painted, by a box."""
    painted = photo[:40, :50].copy()
    painted[5:9, 10:20] = (255, 0, 254)
    picture = canvas.read(painted)
    mask = canvas.mask_for("#ff00fe", picture)
    assert mask[0, 0, 5:9, 10:20].all() and mask.sum() == 40
    assert torch.equal(canvas.mask_for("10,5,20,9", picture), mask)
    alpha = np.full((40, 50, 1), 255, np.uint8)
    alpha[5:9, 10:20] = 0
    assert torch.equal(canvas.mask_for("alpha", canvas.read(np.concatenate([painted, alpha], -1))), mask)
    for words, message in (("alpha", "no transparency"), ("#00ff00", "empty"), ("0,0,60,9", "within 50x40"),
            ("9,9,9,12", "within 50x40"), ("0,0,50,40", "full"), ("#12", "no such file")):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            canvas.mask_for(words, picture)


@pytest.mark.parametrize("quality", [1, 5, 23, 50, 75, 95, 100])
def test_jpeg_quality_is_found(quality, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=quality)
    assert canvas.jpeg_quality(Image.open(tmp_path / "a.jpg")) == quality
    assert canvas.jpeg_quality(Image.open(png(tmp_path, Image.fromarray(photo)))) is None


def test_damaged_or_endless_metadata_does_not_cost_the_photograph(tmp_path, photo):
    long = Image.Exif()
    long[0x010F] = "x" * 70_000
    for name, exif in (("long.png", long.tobytes()), ("bad.jpg", b"Exif\0\0no header")):
        path = png(tmp_path, Image.fromarray(photo), name, exif=exif)
        with pytest.warns(UserWarning, match="metadata"):
            picture = canvas.read(path)
        assert np.array_equal(canvas.to_uint8(picture.image), np.asarray(Image.open(path)))
        assert "exif" not in picture.info
        canvas.save(canvas.to_pil(picture.image, picture), tmp_path / "out.jpg")
    profile = b"x" * (canvas.MAX_PROFILE + 1)
    assert not canvas.read(png(tmp_path, Image.fromarray(photo), "a.jpg", icc_profile=profile)).info


def test_what_a_decoder_stumbles_over_is_a_damaged_file(tmp_path):
    """Pillow raises NotImplementedError here."""
    (tmp_path / "a.dds").write_bytes(b"DDS \x7c\0\0\0\x0f\x10\0\0\1\0\0\0\1\0\0\0" + bytes(108))
    with pytest.raises(ValueError, match="truncated or damaged: Unknown pixel format"):
        canvas.read(tmp_path / "a.dds")


def test_no_program_is_started_for_a_drawing(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(ValueError, match="not an image"):
        canvas.read(tmp_path / "a.png")


def test_a_download_ends(tmp_path, photo, monkeypatch):
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    png(tmp_path, Image.fromarray(photo))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.png"
    assert canvas.read(url).size == photo.shape[:2]
    monkeypatch.setattr(canvas, "MAX_DOWNLOAD", 1000)
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        canvas.read(url)
    server.shutdown()
    server.server_close()


def test_sixteen_bits_of_gray_survive(pipe, tmp_path):
    """Every level of a gray PNG, through reading and writing; and those that are known, through the pipeline."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", levels):
        picture = canvas.read(source)
        for name in ("b.png", "b.tif"):
            canvas.save(canvas.to_pil(picture.image, picture), tmp_path / name)
            assert np.array_equal(np.asarray(Image.open(tmp_path / name)), levels)
    dark = levels[:1, :60].repeat(64, 0)  # nothing above 255
    result = pipe(dark, task="inpainting", mask_image="20,20,40,40").images[0]
    changed = np.asarray(result) != dark
    assert result.mode == "I;16" and changed.any() and not changed[:, :20].any() and not changed[40:].any()
    assert pipe(levels[:64, :64], task="colorization").images[0].mode == "RGB"


def test_what_holds_eight_bits_gets_them(tmp_path):
    image = Image.fromarray(np.full((8, 8), 32896, np.uint16))
    for name in ("a.jpg", "a.bmp", "a.webp"):
        canvas.save(image, tmp_path / name)
        assert Image.open(tmp_path / name).getpixel((3, 3)) == (128, 128, 128)
    assert canvas.sheet([image]).getpixel((12, 12)) == (128, 128, 128)
    assert canvas.diversity([image, Image.fromarray(np.full((8, 8), 33153, np.uint16))]) == 1
