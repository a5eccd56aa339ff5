import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.color import chroma, even_chroma, fit_to_edges, luma
from palette_diffusers.demo_examples import PHOTOGRAPHS
from palette_diffusers.speed import build
from palette_diffusers.tasks import get_task


def dense(right, pull, light, edge):
    """The same system, one pixel at a time, solved by factorisation."""
    height, width = light.shape
    matrix = torch.diag(torch.full((height * width,), pull, dtype=torch.float64))
    for y in range(height):
        for x in range(width):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < height and u < width:
                    weight = torch.exp(-(((light[v, u] - light[y, x]) / edge) ** 2) / 2)
                    a, b = y * width + x, v * width + u
                    matrix[a, a] += weight
                    matrix[b, b] += weight
                    matrix[a, b] -= weight
                    matrix[b, a] -= weight
    return torch.linalg.solve(matrix, right.flatten()).view(height, width)


@pytest.mark.parametrize("given", [False, True])
def test_fields_follow_edges_as_the_equations_say(given):
    generator = torch.Generator().manual_seed(0)
    right, light = (torch.randn(2, n, 6, 9, generator=generator, dtype=torch.float64) for n in (3, 1))
    start = right * 3 if given else None
    found = fit_to_edges(right, 0.05, light * 0.1, 0.08, 120, start)
    for i in range(2):
        for c in range(3):
            exact = dense(right[i, c], 0.05, light[i, 0] * 0.1, 0.08)
            torch.testing.assert_close(found[i, c], exact, atol=1e-5, rtol=0)


def halves():
    """Two halves, each of one luma with a little texture, and blotches of colour all over; (1, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(0)
    light = 0.02 * torch.randn(1, 1, 64, 64, generator=generator)
    light[..., 32:] += 0.5
    blotches = F.interpolate(torch.randn(1, 3, 8, 8, generator=generator) * 0.1, (64, 64), mode="bicubic")
    blotches[:, 0, :, 32:] += 0.2
    return light, light + chroma(blotches)


def test_a_region_has_one_colour_and_two_have_two():
    light, image = halves()
    even = even_chroma(image, light)
    assert torch.allclose(luma(even), light, atol=1e-6)
    for part in (slice(0, 30), slice(34, 64)):
        before, after = chroma(image)[..., part], chroma(even)[..., part]
        assert (after.std((-2, -1)) < 0.5 * before.std((-2, -1))).all()
        assert torch.allclose(after.mean((-2, -1)), before.mean((-2, -1)), atol=0.02)
    stronger = chroma(even_chroma(image, light, 1.5))
    assert torch.allclose(stronger, 1.5 * chroma(even), atol=1e-5)
    contrasted, color = chroma(even_chroma(image, light, contrast=torch.full((1, 1, 1, 1), 1.5))), chroma(even)
    mean = color.mean((-2, -1), keepdim=True)
    assert torch.allclose(contrasted, mean + 1.5 * (color - mean), atol=1e-5)


def unevenness(image):
    """Of chroma, from one pixel to the next."""
    return chroma(image).diff(dim=-1).abs().mean().item()


def predictions(pipe, task, scheduler):
    """The predicted picture of every step, and its level."""
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((pipe.scheduler.gamma(t).item(), tensors["pred_original_sample"].clone()))
        return tensors

    pipe.scheduler = scheduler
    pipe(
        torch.zeros(3, 32, 32), task=task, generator=torch.Generator().manual_seed(0), num_inference_steps=10,
        mask_image=torch.ones(1, 32, 32).tril() if task == "inpainting" else None,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )  # fmt: skip
    return seen


def test_chroma_guidance_evens_noisy_levels_of_colorization_alone(pipe):
    plain, guided = (
        PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero", chroma_guidance=g) for g in (0, 1)
    )
    colors = [predictions(pipe, "colorization", s) for s in (plain, guided)]
    assert len(colors[1]) == 10 and colors[1][0][0] < 0.75 < colors[1][-1][0]
    first, last = (unevenness(colors[1][k][1]) / unevenness(colors[0][k][1]) for k in (0, -1))
    assert first < 0.1 < 0.2 < last
    holes = [predictions(pipe, "inpainting", s) for s in (plain, guided)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*holes, strict=True))


def test_larger_photographs_are_evened_for_longer(pipe, seeded):
    """Each of a batch as alone; only the levels of log-SNR 1 to 2 tell them apart."""
    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero", chroma_guidance=1)
    task = get_task("colorization")
    given = task.prepare(torch.randn(2, 3, 32, 32, generator=seeded()).clamp(-1, 1), None, [])
    noise = torch.randn(1, 3, 32, 32, generator=seeded(1)).expand(2, -1, -1, -1)
    options = dict(latents=noise, num_inference_steps=10, task=task)  # steps at log-SNR -1, 1, 3: none between
    plain = pipe.denoise(given, **options)
    assert torch.equal(pipe.denoise(given, shrunk=[True, True], **options), plain)
    options["num_inference_steps"] = 13  # -1.5, 0, 1.5
    plain, longer = (pipe.denoise(given, shrunk=[s, s], **options) for s in (False, True))
    mixed = pipe.denoise(given, shrunk=[False, True], **options)
    assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], longer[1]) and not torch.equal(plain, longer)
    assert torch.equal(pipe.denoise(given, **options), plain)


def test_photographs_above_the_networks_size_get_less_of_the_contrast(pipe, seeded):
    task = get_task("colorization")
    given = task.prepare(0.05 * torch.randn(1, 3, 32, 32, generator=seeded()), None, [])
    noise = 0.05 * torch.randn(1, 3, 32, 32, generator=seeded(1))

    def first(contrast, **options):  # of the first step, before contrast feeds back
        seen = []
        settings = dict(chroma_guidance=1, chroma_contrast=contrast)
        pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero", **settings)

        def callback(i, t, tensors):
            seen.append(chroma(tensors["pred_original_sample"]))
            return tensors

        pipe.denoise(given, latents=noise, num_inference_steps=9, task=task, callback=callback, **options)
        return (seen[0] - seen[0].mean((-2, -1), keepdim=True)).norm()

    plain, small, large = first(1), first(1.5), first(1.5, shrunk=[True])
    power = (5 / 4) ** -0.3  # of five steps up to log-SNR 1
    assert small / plain == pytest.approx(1.5**power, rel=0.02)
    assert large / plain == pytest.approx((1 + 0.85 * 0.5) ** power, rel=0.02)


def test_chroma_contrast_acts_on_guided_colours_alone(pipe):
    def first(task="colorization", **settings):
        scheduler = PaletteScheduler(sampling_spacing="logsnr", sampling_variance="zero", **settings)
        return predictions(pipe, task, scheduler)[0][1]

    assert torch.equal(first(chroma_contrast=2), first())
    for contrast in (0, 1):
        found = chroma(first(chroma_guidance=1, chroma_contrast=contrast)).std((-2, -1)).max()
        assert (found < 1e-5) == (contrast == 0)
    assert torch.equal(first("inpainting"), first("inpainting", chroma_guidance=1, chroma_contrast=2))


@pytest.mark.parametrize("solver", [None, "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_tints_are_the_networks_rather_than_the_noises(solver):
    """Of the starter: without noise in the tint, seeds give more like ones, under any solver."""
    pipe = PalettePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    own = dict(pipe.scheduler.config)
    cat = Image.open(PHOTOGRAPHS / "cat-gray.jpg").convert("RGB").resize((64, 64))

    def spread(slow_noise):
        kind = PaletteScheduler if solver is None else getattr(diffusers, solver)
        pipe.scheduler = build(kind, own, slow_noise=slow_noise)
        options = dict(num_images_per_input=6, generator=torch.Generator().manual_seed(0), output_type="pt")
        return chroma(pipe(cat, "colorization", num_inference_steps=4, **options).images).mean((-2, -1)).std(0).norm()

    assert spread(0) < 0.7 * spread(1)


def test_chroma_guidance_is_a_setting_of_the_checkpoint(pipe, tmp_path):
    with pytest.raises(ValueError, match="chroma_guidance is -1, expected 0"):
        PaletteScheduler(chroma_guidance=-1)
    with pytest.raises(ValueError, match="chroma_contrast is -1, expected 0"):
        PaletteScheduler(chroma_contrast=-1)
    pipe.scheduler = PaletteScheduler(chroma_guidance=1.25, chroma_contrast=1.5)
    pipe.speed("fast")
    assert type(pipe.scheduler).__name__ == "PaletteScheduler" and pipe.scheduler.config.sampling_order == 2
    pipe.save_pretrained(tmp_path)
    config = PalettePipeline.from_pretrained(tmp_path).scheduler.config
    assert (config["chroma_guidance"], config["chroma_contrast"]) == (1.25, 1.5)
    starter = PalettePipeline.from_pretrained()
    assert starter.scheduler.config.chroma_guidance > 0
