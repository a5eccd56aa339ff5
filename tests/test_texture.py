"""Texture of filled holes: that of their surroundings, where these have one."""

import numpy as np
import pytest
import torch

from palette_diffusers import texture
from palette_diffusers.color import luma
from palette_diffusers.sizes import resize


def woven(height, width, seed=0):
    """Noise of a slanted grain: (1, 3, H, W), luma 0.2 on average."""
    noise = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    shape = torch.exp(-(((down + across) / 0.05) ** 2)) * torch.exp(-(((down - across) / 0.4) ** 2))
    grain = torch.fft.irfft2(torch.fft.rfft2(noise) * shape, s=(height, width))
    return (0.2 + 0.1 * grain / grain.std()).expand(1, 3, -1, -1).clone()


def border(height, width, first):
    hole = torch.zeros(1, 1, height, width)
    hole[..., first:] = 1
    return hole


def smooth(image, hole):
    """Its hole as a small model fills it: what is left of the truth at a sixth of the size."""
    height, width = image.shape[-2:]
    return torch.where(hole > 0, resize(resize(image, (height // 6, width // 6)), (height, width)), image)


def add(image, hole, patch=24, seed=1, unknown=None):
    out = image.clone()
    height, width = image.shape[-2:]
    ground = torch.randn(
        len(image), 1, height + 2 * patch, width + 2 * patch, generator=torch.Generator().manual_seed(seed)
    )
    texture.add_texture(
        out, hole, hole if unknown is None else unknown, patch,
        lambda top, left, size: ground[..., top + patch :, left + patch :][..., : size[0], : size[1]],
    )  # fmt: skip
    return out


def spectrum(image, patch=24):
    light = luma(image)[0, 0]
    tiles = light.unfold(0, patch, 12).unfold(1, patch, 12)
    tiles = (tiles - tiles.mean((-2, -1), keepdim=True)) * texture._window(patch)
    return torch.fft.rfft2(tiles).abs().square().mean((0, 1))


@pytest.mark.parametrize("height", [200, 490, 700])  # the others in two blocks
def test_a_texture_goes_on(height):
    image, hole = woven(height, 400), border(height, 400, 280)
    filled = smooth(image, hole)
    result = add(filled, hole)
    assert torch.equal(result[..., :280], image[..., :280]), "what is known stays, to the bit"
    here, there = (spectrum(x[..., 290:]) for x in (result, image))
    fine = torch.hypot(torch.fft.fftfreq(24)[:, None], torch.fft.rfftfreq(24)[None]) > 0.1
    assert spectrum(filled[..., 290:])[fine].sum() < 0.2 * there[fine].sum(), "there is something to do"
    assert here[fine].sum() == pytest.approx(there[fine].sum().item(), rel=0.25)
    # and slants the same way
    slants = [torch.fft.rfft2(x[0, 0, :192, 290:386] - 0.2).abs().square() for x in (result, image)]
    ratios = [(s[1:96, 1:48].sum() / s[97:, 1:48].sum()).log().item() for s in slants]
    assert abs(ratios[1]) > 2 and ratios[0] / ratios[1] > 0.7
    assert (result - filled)[..., 290:].mean().abs() < 0.01


def test_the_seam_of_bands_is_none():
    image, hole = woven(1200, 300), border(1200, 300, 150)
    added = (add(smooth(image, hole), hole) - smooth(image, hole))[0, 0, :, 170:290]
    power = added.square().mean(1)
    seams = [480, 960]
    assert np.abs(np.log(torch.stack([power[s - 12 : s + 12].mean() for s in seams]) / power.mean())).max() < 0.5
    steps = added.diff(dim=0).square().mean(1)
    assert max(steps[s - 1] for s in seams) < 3 * steps.median(), "no line where one band meets the next"


def lattice(height, width):
    """A sky, and a lattice of thin bars before it."""
    image = torch.full((1, 3, height, width), -0.5)
    for offset in range(0, 200, 50):
        for row in range(height):
            image[..., row, 200 + (offset + row) % 60] = 0.5
    return image


@pytest.mark.parametrize("image", [lattice(200, 400), torch.full((1, 3, 200, 400), 0.3)], ids=["lattice", "flat"])
def test_what_is_no_texture_is_left_alone(image):
    hole = border(200, 400, 300)
    filled = torch.where(hole > 0, -0.5 * torch.ones(()), image)
    assert (add(filled, hole) - filled).abs().max() < 0.01


def test_a_texture_that_is_there_is_not_doubled():
    image, hole = woven(200, 400), border(200, 400, 280)
    before, after = (x[..., 290:].std() for x in (image, add(image, hole)))
    assert after < 1.15 * before


def test_other_holes_tell_nothing():
    image, hole = woven(200, 400), border(200, 400, 280)
    filled, other = smooth(image, hole), hole.clone()
    other[..., 20:120] = 1
    noisy = torch.where((other - hole) > 0, torch.rand(1, 1, 200, 400), filled)
    first, second = (add(x, hole, unknown=other) for x in (filled, noisy))
    assert torch.equal(first[..., 280:], second[..., 280:])


@pytest.mark.parametrize("shape", [(20, 400), (200, 40), (23, 23)])
def test_no_room_no_texture(shape):
    image = woven(*shape)
    hole = border(*shape, shape[1] - 10)
    assert torch.equal(add(image, hole), image)


def test_each_variation_has_its_own_and_is_the_same_alone():
    image, hole = woven(200, 400), border(200, 400, 280)
    filled = smooth(image, hole)
    ground = torch.randn(2, 1, 248, 448, generator=torch.Generator().manual_seed(0))

    def made(some):
        out = filled.repeat(len(some), 1, 1, 1)
        texture.add_texture(
            out, hole, hole, 24, lambda top, left, s: some[..., top + 24 :, left + 24 :][..., : s[0], : s[1]]
        )
        return out

    both = made(ground)
    assert (both[0] - both[1])[..., 280:].std() > 0.05
    assert torch.allclose(made(ground[1:])[0], both[1], atol=1e-5)


@pytest.mark.parametrize(("height", "patch"), [(481, 24), (503, 24), (1000, 64)])
def test_the_last_rows_have_it_too(height, patch):
    image, hole = woven(height, 600), border(height, 600, 380)
    filled = smooth(image, hole)
    added = (add(filled, hole, patch) - filled)[0, 0, :, 400:580].square().mean(1).sqrt()
    rows = height % 480 if patch == 24 else height % 448
    assert added[-rows:].mean() > 0.6 * added.mean(), "though there is no room for a patch below the last block's edge"


def test_far_from_what_is_known():
    """The far end of a wide border, in a corner, in blocks of its own."""
    image, hole = woven(1200, 900), border(1200, 900, 400)
    hole[..., :700, :] = 1
    filled = smooth(image, hole)
    added = (add(filled, hole) - filled)[0, 0]
    assert added[:100, 800:].std() > 0.6 * added[720:, 420:520].std()


def test_a_disc_that_ends_in_the_next_block():
    image = woven(700, 400)
    rows, columns = torch.meshgrid(torch.arange(700), torch.arange(400), indexing="ij")
    hole = ((rows - 400) ** 2 + (columns - 200) ** 2 < 90**2).float()[None, None]
    filled = smooth(image, hole)
    added = (add(filled, hole) - filled)[0, 0]
    assert added[481:489, 190:210].std() > 0.5 * added[380:420, 180:220].std()


def test_variations_and_seeds(pipe):
    """A hole's texture doesn't depend on whether another is made beside it, nor the next hole on the first's."""
    image = (woven(256, 256)[0].permute(1, 2, 0).numpy() + 1) / 2
    mask = np.zeros((256, 256), np.float32)
    mask[20:80, 20:80] = mask[180:240, 180:240] = 1
    given = dict(task="inpainting", mask_image=mask, output_type="pt", num_inference_steps=2)
    seeded = lambda n: torch.Generator().manual_seed(n)  # noqa: E731
    two = pipe(image, num_images_per_input=2, generator=seeded(3), **given).images
    again = pipe(image, num_images_per_input=2, generator=seeded(3), **given).images
    assert torch.equal(two, again) and not torch.equal(two[0], two[1])
    off = pipe(image, num_images_per_input=2, generator=seeded(3), texture=False, **given).images
    coarse = lambda x: torch.nn.functional.avg_pool2d(x, 30)  # noqa: E731
    assert (coarse(two[0] - off[0]).abs().max()) < 0.1, "the second hole's own sample is the same without texture"


def test_it_can_be_left_out(pipe):
    image, hole = woven(200, 256), border(200, 256, 128)
    mask = hole[0, 0].numpy() > 0
    photo = ((image[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    given = dict(task="inpainting", mask_image=(mask * 255).astype(np.uint8), output_type="pt")
    own, on, off = (
        pipe(photo, generator=torch.Generator().manual_seed(0), texture=wanted, **given).images[0]
        for wanted in (None, True, False)
    )
    assert torch.equal(own, on) and not torch.equal(on, off)
    assert torch.equal(on[:, ~mask], off[:, ~mask])
    with pytest.raises(ValueError, match="texture belongs to tasks that fill a hole, the task is 'colorization'"):
        pipe(photo, task="colorization", texture=False)
