import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

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
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".a.png.") and p.name.endswith(".part")]
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        canvas.save(Image.fromarray(photo), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"
    with pytest.raises(ValueError, match="suffix"):
        canvas.save(Image.fromarray(photo), tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: the picture can't be written there"):
        canvas.save(Image.fromarray(photo), tmp_path / "nowhere" / "a.png")


def test_a_mask_may_be_as_large_as_its_picture(monkeypatch):
    monkeypatch.setattr(canvas, "MAX_PIXELS", 100)
    pixels = np.zeros((20, 30), np.uint8)
    pixels[3, 4] = 255
    assert canvas.read_mask(Image.fromarray(pixels), (20, 30)).sum() == 1
    assert canvas.read_mask(Image.fromarray(pixels.T), (30, 20)).sum() == 1
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


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors(channels, seeded):
    image = torch.rand(channels, 5, 7, generator=seeded()) * 2 - 1
    for source in (image, image[None], image.double(), image.clone().requires_grad_()):
        picture = canvas.read(source)
        assert torch.equal(picture.image, image.expand(3, 5, 7)[None]) and picture.image.dtype == torch.float32
        assert picture.image.is_contiguous() and picture.alpha is None and picture.size == (5, 7)
        assert not picture.image.requires_grad
    for wrong in (torch.zeros(2, channels, 5, 7), torch.zeros(1, 1, channels, 5, 7), torch.zeros(channels, 0, 7)):
        with pytest.raises(ValueError, match="^tensor is"):
            canvas.read(wrong)


def test_arrays_of_every_kind(photo):
    wide = photo.astype(np.uint16) * 257
    for source in (photo, wide, photo / 255, (photo / 255).astype(np.float32)):
        assert np.array_equal(canvas.to_uint8(canvas.read(source).image), photo)
    fine = canvas.read(np.array([[0, 1, 65534, 65535]], np.uint16)).image[0, 0, 0].double()
    torch.testing.assert_close(fine, torch.tensor([0, 1, 65534, 65535]).double() / 32767.5 - 1, atol=1e-7, rtol=0)
    for gray in (photo[..., 0], photo[..., :1]):
        picture = canvas.read(gray)
        assert np.array_equal(canvas.to_uint8(picture.image), photo[..., :1].repeat(3, -1)) and picture.alpha is None
    one = canvas.read(photo[:1, :, :1])
    assert one.size == (1, 200) and np.array_equal(canvas.to_uint8(one.image), photo[:1, :, :1].repeat(3, -1))
    picture = canvas.read(np.concatenate([photo, photo[..., 1:2]], -1))
    assert picture.image.shape[1] == 3 and picture.image.is_contiguous()
    assert torch.equal(picture.alpha[0, 0], torch.from_numpy(photo[..., 1].copy()).float() / 255)
    assert np.array_equal(np.asarray(canvas.to_pil(picture.image, picture))[..., 3], photo[..., 1])


@pytest.mark.parametrize(("name", "low", "make"), [
    ("array", 0.0, lambda x: np.full((2, 2), x)),
    ("tensor", -1.0, lambda x: torch.full((3, 2, 2), x)),
    ("mask", 0.0, lambda x: torch.full((2, 2), x)),
])  # fmt: skip
def test_a_rounding_error_is_no_value_out_of_range(name, low, make):
    read = (lambda x: canvas.read_mask(x, (2, 2))) if name == "mask" else canvas.read
    for value, right in ((low - 9e-5, True), (1 + 9e-5, True), (low - 2e-4, False), (1.001, False), (np.inf, False)):
        try:
            read(make(value))
            told = ""
        except ValueError as error:
            told = str(error)
        assert told.startswith(f"{name} has values") != right, (value, told)


def test_lists(photo):
    pictures = canvas.read_list(torch.rand(3, 3, 4, 5))
    assert len(pictures) == 3 and all(picture.size == (4, 5) for picture in pictures)
    assert [p.size for p in canvas.read_list((photo, photo[:50]))] == [(150, 200), (50, 200)]
    assert len(canvas.read_list(torch.rand(3, 4, 5))) == len(canvas.read_list(photo)) == 1
    picture = canvas.read(photo)
    assert canvas.read_list([picture])[0] is picture
    with pytest.raises(ValueError, match="the limit is 99"):
        canvas.read_list([Image.fromarray(photo)], max_pixels=99)
    with pytest.raises(ValueError, match="^the list of images is empty$"):
        canvas.read_list(())


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (1, 1, 4, 6)])
def test_masks_of_any_rank(shape):
    mask = torch.zeros(4, 6)
    mask[1, 2], mask[2, 3] = 0.51, 0.5
    read = canvas.read_mask(mask.reshape(shape), (4, 6))
    assert read.shape == (1, 1, 4, 6) and read.sum() == 1 and read[0, 0, 1, 2] == 1 and read.dtype == torch.float32
    for wrong in (torch.zeros(2, 4, 6), torch.zeros(1, 1, 1, 4, 6), torch.zeros(2, 1, 4, 6), torch.zeros(6)):
        with pytest.raises(ValueError, match=r"mask is \(.*\), expected \(H, W\), \(1, H, W\) or \(1, 1, H, W\)"):
            canvas.read_mask(wrong, (4, 6))


def test_what_is_white_in_a_mask():
    """More than half, over the channels; a file's mask of three channels is one mask."""
    mask = np.zeros((2, 3, 3), np.uint8)
    mask[0, 0], mask[0, 1], mask[1, 2] = 128, 127, (255, 255, 0)
    read = canvas.read_mask(Image.fromarray(mask), (2, 3))
    assert read.shape == (1, 1, 2, 3) and read[0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert canvas.mask_for(Image.fromarray(mask), canvas.read(mask)).sum() == 2
    with pytest.raises(ValueError, match="^mask is 3x2, the image 9x8: they must have the same size$"):
        canvas.read_mask(Image.fromarray(mask), (8, 9))
    for pixels, message in ((mask * 0, "^the mask is empty"), (mask * 0 + 255, "^the mask is full")):
        with pytest.raises(ValueError, match=message):
            canvas.read_mask(pixels, (2, 3))


def test_transparency_as_a_mask(photo):
    alpha = np.ones((3, 4, 1))
    alpha[0, 0], alpha[1, 1] = 0.5, 0.49
    picture = canvas.read(np.concatenate([photo[:3, :4] / 255, alpha], -1))
    assert canvas.mask_for("alpha", picture).sum() == 1
    opaque, mask = canvas.with_mask(picture, "alpha")
    assert opaque.alpha is None and torch.equal(opaque.image, picture.image) and mask[0, 0, 1, 1] == 1
    kept, mask = canvas.with_mask(picture, "0,0,1,1")
    assert kept.alpha is picture.alpha and mask.sum() == mask[0, 0, 0, 0] == 1
    for box in ("2,0,2,1", "0,1,2,1", "0,0,5,1", "0,0,1,4"):
        with pytest.raises(ValueError, match=f"the box is {box}, expected LEFT,TOP,RIGHT,BOTTOM of a box within 4x3"):
            canvas.mask_for(box, picture)
    with pytest.raises(ValueError, match="^the mask is alpha, but the picture has no transparency$"):
        canvas.mask_for("alpha", canvas.read(photo))


def test_a_mask_whose_name_has_a_comma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 255
    Image.fromarray(mask).save("a,b.png")
    picture = canvas.read(np.zeros((4, 6), np.uint8))
    assert canvas.mask_for("a,b.png", picture).sum() == 1
    with pytest.raises(FileNotFoundError, match="1,2,3"):
        canvas.mask_for("1,2,3", picture)


def test_pixels_are_limited_and_rounded():
    image = torch.tensor([-9.0, -1, -0.996, 0.9, 1, 1.01, 9]).expand(1, 3, 1, 7)
    assert canvas.to_uint8(image)[0, :, 0].tolist() == [0, 0, 1, 242, 255, 255, 255]
    out = canvas.to_pil(image)
    assert out.mode == "RGB" and out.size == (7, 1) and not out.info


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".JPEG"])
def test_files_are_written_as_told(suffix, photo, tmp_path):
    """Lossless where the format can, JPEG at 95 and 4:4:4; with profile, EXIF and recipe, and readable by others."""
    from PIL import ImageCms

    image = Image.fromarray(np.concatenate([photo, photo[..., :1]], -1))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    image.info = {"icc_profile": profile, "exif": exif.tobytes(), canvas.RECIPE: '{"seed": 3}'}
    path = tmp_path / f"a{suffix}"
    for umask in (0o077, 0o022):  # rights are those of any new file
        before = os.umask(umask)
        canvas.save(image, path)
        os.umask(before)
        assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.stat().st_mode & 0o777 == 0o666 & ~umask
    again = Image.open(path)
    assert again.info["icc_profile"] == profile and again.getexif()[0x010F] == "Maker"
    assert again.info.get(canvas.RECIPE) == ('{"seed": 3}' if suffix == ".png" else None)
    if again.format == "JPEG":
        assert canvas.jpeg_quality(again) == 95 and again.mode == "RGB" and again.layer[0][1:3] == (1, 1)
        assert [component[1:3] for component in again.layer] == [(1, 1)] * 3
    else:
        assert np.array_equal(np.asarray(again)[photo[..., 0] > 0], np.asarray(image)[photo[..., 0] > 0])


@pytest.mark.parametrize("quality", range(1, 101))
def test_every_jpeg_quality(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    assert canvas.jpeg_quality(Image.open(file)) == quality


def test_jpeg_quality_of_other_tables_and_files():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", qtables=[[min(255, 2 * q + 1) for q in canvas.LUMINANCE.tolist()]])
    assert canvas.jpeg_quality(Image.open(file)) == 25
    several = io.BytesIO()
    Image.new("RGB", (8, 8)).save(several, "MPO", quality=40, save_all=True, append_images=[Image.new("RGB", (8, 8))])
    picture = Image.open(several)
    assert picture.format == "MPO" and canvas.jpeg_quality(picture) == 40
    assert canvas.jpeg_quality(Image.new("L", (8, 8))) is None


def test_diversity_and_sheet():
    black, white, red = (Image.new("RGB", (90, 60), color) for color in ("black", "white", (255, 0, 0)))
    assert canvas.diversity([black, white]) == 255 and canvas.diversity([red, red]) == 0
    assert canvas.diversity([black, white, red.convert("RGBA")]) == pytest.approx((255 + 85 + 170) / 3)
    made = canvas.sheet([black, white, red, red, black], side=30, gap=5)
    assert made.size == (3 * 35 + 5, 2 * 25 + 5) and made.getpixel((0, 0)) == (255, 255, 255)
    assert made.getpixel((20, 15)) == (0, 0, 0) and made.getpixel((20, 40)) == (255, 0, 0)
    assert made.getpixel((90, 15)) == (255, 0, 0) and made.getpixel((55, 40)) == (0, 0, 0)
    assert black.size == (90, 60)
    assert canvas.sheet([black], side=900).size == (90 + 16, 60 + 16)


@pytest.mark.parametrize(("mode", "levels", "high"), [
    ("I;16", [0, 1, 300, 65535], 65535), ("I;16B", [0, 1, 300, 65535], 65535), ("I;16", [0, 1, 200, 255], 65535),
    ("I", [0, 7, 256, 40000], 65535), ("I", [0, 0, 0, 1], 255), ("F", [0, 0.25, 0.5, 1], 1), ("F", [0, 1, 1.5, 2], 255),
    ("F", [0, 1, 254, 255], 255), ("F", [0, 1, 255, 255.5], 65535),
])  # fmt: skip
def test_gray_levels_beyond_a_byte(mode, levels, high):
    """Where the mode is not of 16 bits, the largest value says whether white is 1, 255 or 65535."""
    kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16, "I;16B": ">u2"}[mode]
    image = Image.frombytes(mode, (4, 1), np.array(levels, kind).tobytes())
    picture = canvas.read(image)
    expected = torch.tensor(levels).double() / high * 2 - 1
    torch.testing.assert_close(picture.image[0, 0, 0].double(), expected, atol=1e-6, rtol=0)
    assert picture.image.shape == (1, 3, 1, 4) and picture.alpha is None


def test_gray_levels_that_are_none():
    with pytest.raises(ValueError, match="^image has pixels that are not finite$"):
        canvas.read(Image.fromarray(np.array([[0.5, np.nan]], np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P", "L"])
def test_transparency_of_every_mode(mode):
    """As Pillow itself makes RGBA of it; a colour that stands for nothing is transparent, too."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 200, 200, 0), (90, 90, 90, 128), (10, 10, 10, 255)])
    image = image.convert({"PA": "LA", "La": "LA", "P": "L", "L": "L"}.get(mode, "RGBA")).convert(mode)
    upright = image.convert("LA") if mode == "La" else image
    if mode in ("P", "L"):
        image.info["transparency"] = image.getpixel((0, 0))
    picture = canvas.read(image)
    expected = np.asarray(upright.convert("RGBA"))
    assert picture.alpha.shape == (1, 1, 1, 3)
    assert torch.equal(picture.alpha[0, 0], torch.from_numpy(expected[..., 3].copy()) / 255)
    assert np.array_equal(canvas.to_uint8(picture.image), expected[..., :3])


def test_a_profile_of_inks_is_not_one_of_the_picture(photo):
    image = Image.fromarray(photo).convert("CMYK")
    image.info["icc_profile"] = bytes(16) + b"CMYK" + bytes(108)
    assert not canvas.read(image).info
    image = Image.fromarray(photo)
    image.info["icc_profile"] = bytes(16) + b"RGB " + b"x" * (canvas.MAX_PROFILE - 20)
    assert canvas.read(image).info == {"icc_profile": image.info["icc_profile"]}


def gray_profile(gamma=1.8, connection=b"XYZ "):
    """What scanners and Photoshop give gray pictures: a curve, to a version 2 of the format."""
    name = b"Gray" + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)),
        b"cprt": b"text\0\0\0\0none\0",
    }
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI", size, b"lcms", 0x02100000) + b"mntrGRAY" + connection
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + data


def test_a_profile_of_gray_goes_on_in_colour(tmp_path):
    """Its curve does: the levels are the same bits, and look the same to who manages colours."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = png(tmp_path, Image.fromarray(levels), icc_profile=gray_profile())
    picture = canvas.read(path)
    canvas.save(canvas.to_pil(picture.image, picture), tmp_path / "b.png")
    out = Image.open(tmp_path / "b.png")
    assert out.mode == "RGB" and np.array_equal(np.asarray(out)[..., 1], levels)

    def seen(image):
        own, common = (ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"])), ImageCms.createProfile("sRGB"))
        return np.asarray(ImageCms.profileToProfile(image, own, common, outputMode="RGB")).astype(int)

    assert np.abs(seen(out) - seen(Image.open(path))).max() <= 1
    assert np.abs(seen(out)[..., 0] - levels).max() > 10  # as sRGB it would look otherwise
    deep = png(tmp_path, Image.fromarray(levels.astype(np.uint16) * 257), "c.png", icc_profile=gray_profile())
    picture = canvas.read(deep)
    assert canvas.to_pil(picture.image, picture).info["icc_profile"] == gray_profile()  # gray again
    canvas.save(canvas.to_pil(picture.image, picture), tmp_path / "c.jpg")
    assert Image.open(tmp_path / "c.jpg").info["icc_profile"][16:20] == b"RGB "


MANY = gray_profile()[:128] + b"\xff" * 4 + bytes(36)  # of a stranger: four thousand million tags


@pytest.mark.parametrize("profile", [gray_profile(connection=b"Lab "), gray_profile()[:160], bytes(16) + b"GRAY", MANY])
def test_a_profile_of_gray_without_a_curve_is_left_out(profile):
    image = Image.new("L", (4, 4))
    image.info["icc_profile"] = profile
    picture = canvas.read(image)
    with pytest.warns(canvas.LossWarning, match="the colour profile is left out"):
        assert "icc_profile" not in canvas.to_pil(picture.image, picture).info


def test_what_a_tiff_says_of_its_picture_is_kept(tmp_path, photo):
    """And nothing of how its pixels lie in the file."""
    exif = Image.Exif()
    exif[271], exif[306], exif[315], exif[33432], exif[274] = "Maker", "2001:02:03 04:05:06", "Me", "mine", 6
    exif[0x8769], exif[0x8825] = {36867: "2000:01:01 00:00:00"}, {1: "N", 3: "E"}
    path = png(tmp_path, Image.fromarray(photo), "a.tif", exif=exif.tobytes())
    picture = canvas.read(path)
    assert picture.size == (200, 150)  # upright
    for name in ("b.png", "b.jpg", "b.tif"):
        canvas.save(canvas.to_pil(picture.image, picture), tmp_path / name)
        kept = Image.open(tmp_path / name).getexif()
        assert [kept.get(tag) for tag in (271, 306, 315, 33432)] == [exif[tag] for tag in (271, 306, 315, 33432)]
        assert 274 not in kept
        assert kept.get_ifd(0x8769)[36867] == "2000:01:01 00:00:00" and kept.get_ifd(0x8825)[3] == "E"
        assert name == "b.tif" or not {258, 259, 273, 279} & set(kept)
        assert Image.open(tmp_path / name).size == (150, 200)


def test_gray_of_16_bits_with_a_transparent_level(tmp_path):
    """Pillow's conversion to alpha makes all that is above 255 white."""
    levels = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
    path = png(tmp_path, Image.fromarray(levels), transparency=0)
    with pytest.warns(canvas.LossWarning, match="16 bits and transparency"):
        picture = canvas.read(path)
    assert torch.allclose(picture.image[0, 0], torch.from_numpy(levels / 32767.5 - 1).float(), atol=1e-4)
    assert picture.alpha[0, 0, 0, 0] == 0 and picture.alpha.sum() == levels.size - 1 and not picture.deep
    out = canvas.to_pil(picture.image, picture)
    assert out.mode == "RGBA" and np.abs(np.asarray(out)[..., 0] - levels / 257).max() < 1


def test_a_tiff_of_16_bits_that_was_opened_is_read_twice(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), np.uint16)
    image = Image.open(tiff_of_16_bits(tmp_path / "a.tif", pixels, separate=False))
    for _ in range(2):
        with pytest.warns(canvas.LossWarning, match="16 bits a channel"):
            assert canvas.read(image).size == (9, 7)
    image = Image.open(tiff_of_16_bits(tmp_path / "b.tif", pixels, separate=True))
    for _ in range(2):
        with pytest.raises(ValueError, match="in separate planes"):
            canvas.read(image)
        image.load()


def test_what_is_transparent_in_a_mask_is_not_white(tmp_path):
    """As editors export a layer: white where something was painted, and often under what is not shown."""
    layer = np.zeros((10, 10, 4), np.uint8)
    layer[..., :3] = 255
    layer[2:5, 3:9, 3] = 255
    mask = canvas.read_mask(Image.fromarray(layer), (10, 10))
    assert mask.sum() == 18 and mask[0, 0, 2:5, 3:9].all()
    assert torch.equal(canvas.read_mask(layer[..., 3] > 0, (10, 10)), mask)  # an array of bool


def test_transparency_that_a_format_lacks_is_told(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for name in ("a.jpg", "a.bmp"):
        with pytest.warns(canvas.LossWarning, match=rf"{name}: transparency is left out"):
            canvas.save(image, tmp_path / name)
        assert Image.open(tmp_path / name).mode == "RGB"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", canvas.KINDS)
def test_every_suffix_that_is_offered_is_written(tmp_path, photo, suffix):
    if canvas.KINDS[suffix] not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {suffix}")
    path = tmp_path / f"a{suffix}"
    canvas.save(Image.fromarray(photo), path)
    out = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(out - photo).mean() < 3 and len(list(tmp_path.iterdir())) == 1


def test_limits_are_told_with_the_name(tmp_path, photo):
    path = png(tmp_path, Image.fromarray(photo))
    assert canvas.read(path, max_pixels=30_000).size == (150, 200)
    with pytest.raises(ValueError, match=r"a\.png is 200x150, 30000 pixels: the limit is 29999 \(max_pixels\)"):
        canvas.read(path, max_pixels=29_999)
    with pytest.raises(ValueError, match="image is 3x0, expected at least 1x1"):
        canvas.read(Image.new("RGB", (3, 0)))
    assert canvas.read(Image.new("RGB", (1, 1))).size == (1, 1)
    with pytest.raises(IsADirectoryError, match="is a folder, an image file was expected"):
        canvas.read(tmp_path)


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


def png_of_16_bits(path, pixels):
    """(H, W, 2, 3 or 4) uint16; Pillow writes none of colour."""
    height, width, channels = pixels.shape

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff_of_16_bits(path, pixels, separate):
    """(H, W, 3) uint16, uncompressed, the channels interleaved or one after another."""
    height, width, _ = pixels.shape
    strips = [pixels[..., i] for i in range(3)] if separate else [pixels]
    lengths = [strip.nbytes for strip in strips]
    tags = {
        256: [width], 257: [height], 258: [16] * 3, 259: [1], 262: [2],
        273: [8 + sum(lengths[:i]) for i in range(len(strips))],
        277: [3], 278: [height], 279: lengths, 284: [1 + separate],
    }  # fmt: skip
    data, entries = b"".join(strip.tobytes() for strip in strips), b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            data, packed = data + packed, struct.pack("<I", 8 + len(data))
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_16_bits_is_told(tmp_path, channels, seeded):
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), np.uint16)
    with pytest.warns(canvas.LossWarning, match="a.png has 16 bits a channel: colour is read at 8"):
        picture = canvas.read(png_of_16_bits(tmp_path / "a.png", pixels))
    wanted = pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, -1)
    assert np.abs(canvas.to_uint8(picture.image) - wanted / 257).max() < 1.01
    assert (picture.alpha is None) == (channels == 3)


def test_a_tiff_of_16_bits(tmp_path):
    """Interleaved, it is read at 8 bits, and told; Pillow would make noise of one in planes."""
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), np.uint16)
    with pytest.warns(canvas.LossWarning, match="a.tif has 16 bits a channel"):
        picture = canvas.read(tiff_of_16_bits(tmp_path / "a.tif", pixels, separate=False))
    assert np.abs(canvas.to_uint8(picture.image) - pixels / 257).max() < 1.01
    with pytest.raises(ValueError, match="b.tif has 16 bits a channel in separate planes"):
        canvas.read(tiff_of_16_bits(tmp_path / "b.tif", pixels, separate=True))


@pytest.mark.filterwarnings("error")
def test_nothing_is_told_where_nothing_is_lost(tmp_path, photo):
    for name, image in (("a.png", photo), ("b.tif", photo), ("c.png", photo[..., 0].astype(np.uint16) * 257)):
        canvas.read(png(tmp_path, Image.fromarray(image), name))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" dc:rights="mine"/></x:xmpmeta>'


def tilted() -> bytes:
    """A profile of RGB whose red and green are exchanged: nobody can overlook that it is left out."""
    profile, places = SRGB, {}
    for name in (b"rXYZ", b"gXYZ"):
        entry = profile.index(name, 128)
        places[name] = entry + 4, profile[entry + 4 : entry + 8]
    for name, other in ((b"rXYZ", b"gXYZ"), (b"gXYZ", b"rXYZ")):
        at = places[name][0]
        profile = profile[:at] + places[other][1] + profile[at + 4 :]
    return profile


@pytest.mark.parametrize("suffix", ["bmp", "jp2"])
def test_a_format_without_profiles_gets_colours_that_everybody_shows_alike(tmp_path, suffix):
    image = Image.new("RGB", (16, 16), (200, 40, 60))
    exif = Image.Exif()
    exif[0x010F] = "Canon"
    image.info = {"icc_profile": tilted(), "exif": exif.tobytes()}
    with pytest.warns(canvas.LossWarning, match="date, place, camera and rights are left out"):
        canvas.save(image, tmp_path / f"out.{suffix}")
    made = np.asarray(Image.open(tmp_path / f"out.{suffix}").convert("RGB"))[8, 8].astype(int)
    assert made[1] > made[0] + 80, made
    assert image.info["icc_profile"] == tilted(), "what was given stays as it is"


def test_inks_are_converted_by_their_profile(tmp_path, monkeypatch):
    """There is none to be had freely, so littlecms is only listened to."""
    asked = []
    monkeypatch.setattr(canvas.ImageCms, "ImageCmsProfile", lambda stream: stream.read())
    monkeypatch.setattr(
        canvas.ImageCms, "profileToProfile",
        lambda image, own, to, outputMode: asked.append((image.mode, own)) or Image.new(outputMode, image.size, "red"),  # noqa: N803
    )  # fmt: skip
    inks = SRGB[:16] + b"CMYK" + SRGB[20:]
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg", icc_profile=inks)
    picture = canvas.read(tmp_path / "print.jpg")
    assert asked == [("CMYK", inks)] and "icc_profile" not in picture.info
    assert picture.image[0, :, 4, 4].tolist() == [1, -1, -1]
    monkeypatch.undo()
    with pytest.warns(canvas.LossWarning, match="profile can't be used"):
        canvas.read(tmp_path / "print.jpg")


@pytest.mark.parametrize(("suffix", "dpi"), [("jpg", True), ("png", True), ("tif", True), ("webp", False)])
def test_rights_and_resolution_are_kept(tmp_path, suffix, dpi):
    """Of an upright picture; a format that can't hold them says so."""
    exif = Image.Exif()
    exif[0x010F] = "Canon"
    exif[0x8825] = {1: "N"}
    Image.new("RGB", (16, 8)).save(tmp_path / "in.jpg", xmp=XMP, dpi=(300, 300), exif=exif)
    picture = canvas.read(tmp_path / "in.jpg")
    target = tmp_path / f"out.{suffix}"
    canvas.save(canvas.to_pil(picture.image, picture), target)
    again = canvas.read(target)
    assert b'tiff:Orientation="1" dc:rights="mine"' in again.info["xmp"]
    assert not dpi or again.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    kept = Image.open(target).getexif()
    assert kept[0x010F] == "Canon" and kept.get_ifd(0x8825)[1] == "N"


def test_a_description_that_is_too_long_is_told(tmp_path):
    """After all the work, a JPEG could not be written."""
    image = Image.new("RGB", (8, 8))
    image.info["xmp"] = b"x" * (canvas.MAX_XMP + 1)
    with pytest.warns(canvas.LossWarning, match="a JPEG holds 65504 bytes"):
        canvas.save(image, tmp_path / "a.jpg")
    image.info["xmp"] = b"x" * canvas.MAX_XMP
    canvas.save(image, tmp_path / "a.jpg")
    assert len(Image.open(tmp_path / "a.jpg").info["xmp"]) == canvas.MAX_XMP
    Image.new("RGB", (8, 8)).save(tmp_path / "b.webp", xmp=b"x" * 70_000)
    with pytest.warns(canvas.LossWarning, match="its XMP is left out"):
        assert "xmp" not in canvas.read(tmp_path / "b.webp").info


@pytest.mark.parametrize("kind", ["gif", "png", "tif", "webp"])
def test_of_several_pictures_the_first_is_read_and_that_is_told(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"some.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(canvas.LossWarning, match="several pictures: the first is read"):
        picture = canvas.read(tmp_path / f"some.{kind}")
    assert picture.image[0, :, 4, 4].tolist() == pytest.approx([1, -1, -1], abs=0.02)


def test_an_opened_jpeg_is_its_file_as_long_as_nobody_changes_it(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=10)
    opened = Image.open(tmp_path / "a.jpg")
    assert canvas.read(opened).file == tmp_path / "a.jpg"
    opened.putpixel((3, 3), (255, 0, 0))
    assert canvas.read(opened).file is None
    small = Image.open(tmp_path / "a.jpg")
    small.thumbnail((50, 50))
    assert canvas.read(small).file is None and canvas.read(Image.fromarray(photo)).file is None
    with pytest.raises(ValueError, match="the limit is 100"):
        canvas.read(big := Image.open(tmp_path / "a.jpg"), 100)
    assert big.tile, "refused before it is decoded"
    assert canvas.read(Image.open(os.fsencode(tmp_path / "a.jpg"))).file == tmp_path / "a.jpg"
    named = Image.open(io.BytesIO((tmp_path / "a.jpg").read_bytes()))
    named.filename = "x" * 5000
    assert canvas.read(named).file is None
    gone = Image.open(tmp_path / "a.jpg")
    gone.load()
    (tmp_path / "a.jpg").unlink()
    assert canvas.read(gone).file is None


def test_webp_keeps_what_lies_under_transparency(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[4:12, 4:12, 3] = 0
    canvas.save(Image.fromarray(pixels), tmp_path / "a.webp")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.webp")), pixels)


def test_a_limit_above_pillows_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (50, 50)).save(tmp_path / "large.png")
    assert canvas.read(tmp_path / "large.png", 2500).size == (50, 50)
    with canvas._limit(300), canvas._limit(200):
        assert Image.MAX_IMAGE_PIXELS == 300
    one, other = canvas._limit(200), canvas._limit(300)
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 300, "the other one still reads"
    other.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ValueError, match="large.png"):
        canvas.read(tmp_path / "large.png", 2499)


@pytest.mark.parametrize("word", ["2, 2, 6, 6", "#f00", "#F00", "#ff0000"])
def test_words_for_masks_as_people_write_them(word):
    image = Image.new("RGB", (8, 8))
    image.paste("red", (2, 2, 6, 6))
    assert canvas.mask_for(word, canvas.read(image)).sum() == 16


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_a_line_along_an_edge_is_found(photo, side):
    image = canvas.read(photo[:150, :200]).image
    axis = {"top": 2, "bottom": 2, "left": 3, "right": 3}[side]
    length = image.shape[axis]
    for depth in (1, 2, 3, 20):
        lined = image.clone()
        lined.narrow(axis, 0 if side in ("top", "left") else length - depth, depth).fill_(-0.9)
        found = {name: canvas.line_at(lined, name) for name in ("top", "bottom", "left", "right")}
        assert found.pop(side) == (depth if depth < 4 else 0) and not any(found.values())  # a wide one is the picture's
    assert canvas.line_at(torch.zeros(1, 3, 40, 40), side) == 0


def test_photographs_have_no_line_along_their_edges():
    from skimage import data

    for picture in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.camera(), data.brick()):
        assert not any(canvas.line_at(canvas.read(picture).image, s) for s in ("top", "bottom", "left", "right"))


def test_metadata_tells_the_size_of_what_was_made(tmp_path, photo):
    """An uncropped or a turned picture's, not the original's; metadata that tells no size gets none."""
    from PIL import ExifTags

    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Orientation] = "me", 6
    camera = exif.get_ifd(ExifTags.IFD.Exif)
    width, height = ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight
    camera |= {width: photo.shape[1], height: photo.shape[0], ExifTags.Base.ISOSpeedRatings: 200}
    turned = canvas.read(png(tmp_path, Image.fromarray(photo), "a.jpg", exif=exif))
    for picture in (turned.image, torch.nn.functional.pad(turned.image, (3, 4, 5, 6))):
        canvas.save(canvas.to_pil(picture, turned), tmp_path / "out.jpg")
        written = Image.open(tmp_path / "out.jpg")
        found = written.getexif().get_ifd(ExifTags.IFD.Exif)
        assert (found[width], found[height]) == written.size == tuple(picture.shape[:-3:-1])
        assert found[ExifTags.Base.ISOSpeedRatings] == 200 and written.getexif()[ExifTags.Base.Artist] == "me"
    del camera[width], camera[height]
    silent = canvas.read(png(tmp_path, Image.fromarray(photo), "b.jpg", exif=exif))
    assert canvas.to_pil(silent.image[..., 1:], silent).info["exif"] == silent.info["exif"]


def test_a_pale_tensor_is_told(photo, caplog):
    unit = torch.from_numpy(photo).permute(2, 0, 1) / 255
    canvas.read(unit * 2 - 1)
    canvas.read(torch.zeros(3, 8, 8))
    assert not caplog.records
    assert canvas.read(unit).size == photo.shape[:2]
    assert "is it in [0, 1]? pass 2 * tensor - 1" in caplog.text
