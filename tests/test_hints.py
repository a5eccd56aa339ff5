import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from palette_diffusers import canvas
from palette_diffusers.cli import app
from palette_diffusers.color import chroma, even_chroma, luma
from palette_diffusers.hints import Spread
from palette_diffusers.tasks import Colorization


def halves(height=96, width=128) -> np.ndarray:
    """A dark and a light half, one edge between them."""
    gray = np.full((height, width, 3), 80, np.uint8)
    gray[:, width // 2 :] = 180
    return gray


def strokes(size, color="#d02020") -> Image.Image:
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).line([(20, 30), (20, 60)], fill=color, width=5)
    return image


def red(image: torch.Tensor) -> torch.Tensor:
    return (image[0] - image[1]) * 127.5


def test_a_stroke_is_honoured_and_its_colour_spreads_to_the_edge(pipe):
    """Exactly at the stroke; over its half, far from the stroke too, and hardly beyond the edge."""
    hints, ask = strokes((128, 96)), dict(task="colorization", output_type="pt")
    free, held = (
        pipe(halves(), hints=h, generator=torch.Generator().manual_seed(0), **ask).images[0] for h in (None, hints)
    )
    where = torch.from_numpy(np.asarray(hints)[..., 3] > 127)
    want = chroma(canvas.read(hints).image)[0][:, where]
    scale = chroma(held[None])[0][:, where].norm(dim=0) / want.norm(dim=0)  # kept in gamut over the dark half
    assert where.sum() > 100 and torch.allclose(chroma(held[None])[0][:, where], want * scale, atol=1e-4)
    assert (scale > 0.6).all()
    change = red(held) - red(free)
    near, far, beyond = change[40:50, 28:36].mean(), change[10:86, 40:58].mean(), change[:, 70:].abs().mean()
    assert near > 40 and far > 15 and beyond < 0.2 * far
    assert torch.allclose(luma(held[None]), luma(canvas.read(halves()).image), atol=1e-4)


def test_a_stroke_leaves_no_halo_beyond_a_line(pipe):
    """A thin line between two things of one luma, on a photograph ten times the network's size."""
    image = np.full((240, 320, 3), 120, np.uint8)
    image[:, 156:164] = 20
    hints = Image.new("RGBA", (320, 240))
    ImageDraw.Draw(hints).line([(60, 40), (60, 200)], fill="#d02020", width=20)
    ask = dict(task="colorization", output_type="pt")
    held, free = (
        pipe(image, hints=h, generator=torch.Generator().manual_seed(0), **ask).images[0] for h in (hints, None)
    )
    change = red(held) - red(free)
    inside, beyond = change[40:200, 140:154].mean(), change[40:200, 166:180].abs().mean()
    assert inside > 30 and beyond < 0.15 * inside, (inside, beyond)


def test_the_steps_together_take_the_share_of_a_stroke():
    """Taken whole at every step, a share of 15% was three quarters after eight: one stroke tinted the photograph."""
    share = torch.tensor([0.0, 0.15, 0.6, 1.0]).reshape(1, 1, 1, 4)
    spread = Spread(chroma(torch.rand(1, 3, 1, 4)) * share, share)
    free = chroma(torch.rand(1, 3, 1, 4))
    held = free
    for _ in range(8):
        held = Colorization(spread).in_steps(8).hints.blend(held)
    torch.testing.assert_close(held, spread.blend(free), atol=1e-5, rtol=0)


def test_what_has_no_stroke_is_not_pushed_to_the_opposite_colour():
    """A blue stroke over half of a gray picture turned the other half brown."""
    color = torch.zeros(1, 3, 16, 32)
    color[..., :16] = torch.tensor([-0.3, -0.1, 0.6]).reshape(3, 1, 1)
    color = chroma(color)
    own, light, contrast = torch.ones(1, 1, 16, 32), torch.zeros(1, 1, 16, 32), torch.full((1, 1, 1, 1), 2.0)
    own[..., :16] = 0
    light[..., :16] = 0.3  # an edge between them
    image, free = (even_chroma(light + color, light, 1.0, contrast, part) for part in (own, None))
    right = chroma(free)[..., 20:]
    assert right[:, 0].mean() > 0.1 > -0.1 > right[:, 2].mean(), "it is the contrast that does it"
    assert chroma(image)[..., 20:].abs().max() < 0.02
    torch.testing.assert_close(chroma(image)[..., :12], color[..., :12], atol=0.02, rtol=0)


def test_each_photograph_has_its_own_hints(pipe):
    seeds = [torch.Generator().manual_seed(k) for k in (0, 1)]
    ask = dict(task="colorization", output_type="pt")
    both = pipe([halves(), halves()], hints=[None, strokes((128, 96))], generator=seeds, **ask).images
    free = pipe(halves(), generator=torch.Generator().manual_seed(0), **ask).images[0]
    assert (both[0] - free).abs().max() < 1 / 127.5 and red(both[1])[40:50, 28:36].mean() > 20


@pytest.mark.parametrize(("hints", "message"), [
    (Image.new("RGBA", (128, 96)), "hints are empty"),
    (Image.new("RGB", (128, 96)), "no transparency"),
    (Image.new("RGBA", (64, 96), "red"), "hints are 64x96, the image 128x96"),
    ([strokes((128, 96))] * 2, "2 hints came for 1 images"),
])  # fmt: skip
def test_bad_hints(pipe, hints, message):
    with pytest.raises(ValueError, match=message):
        pipe(halves(), task="colorization", hints=hints)
    with pytest.raises(ValueError, match="hints belong to 'colorization'"):
        pipe(halves(), task="jpeg_restoration", hints=strokes((128, 96)))


def test_hints_on_the_command_line(pipe, tmp_path):
    """And `palette again` finds them by their name, beside the picture."""
    pipe.save_pretrained(tmp_path / "model")
    Image.fromarray(halves()).save(tmp_path / "in.png")
    strokes((128, 96)).save(tmp_path / "strokes.png")
    command = ["colorize", "in.png", "--hints", "strokes.png", "--model", "model", "-o", "out.png"]
    words = [str(tmp_path / word) if "." in word or word == "model" else word for word in command]
    assert CliRunner().invoke(app, words).exit_code == 0
    picture = canvas.read(tmp_path / "out.png").image[0]
    assert red(picture)[30:60, 20].min() > 20
    out = CliRunner().invoke(app, ["again", str(tmp_path / "out.png")])
    assert out.exit_code == 0, out.output
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("out.png", "out-again.png"))
    assert np.array_equal(first, second)
    missing = CliRunner().invoke(app, [*words[:3], str(tmp_path / "none.png"), *words[4:]])
    assert missing.exit_code == 2 and "none.png: no such file" in missing.output
