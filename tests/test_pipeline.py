import os
import re

import diffusers
import numpy as np
import pytest
import torch
from conftest import toy_unet
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteScheduler, Task, canvas, sizes
from palette_diffusers.color import is_gray, luma
from palette_diffusers.pipeline import STARTER, STUDENT
from palette_diffusers.scheduler import noise_level, output_for
from palette_diffusers.speed import build
from palette_diffusers.tasks import Given

TASKS = ("colorization", "inpainting", "uncropping", JPEG := "jpeg_restoration")


def options(task, photo):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[40:70, 50:90] = 255
    return {"inpainting": {"mask_image": mask}, "uncropping": {"left": 10, "top": 0.1}}.get(task, {})


@pytest.mark.parametrize("task", TASKS)
def test_same_size_and_known_pixels(pipe, task, photo):
    extra = options(task, photo)
    out = np.asarray(pipe(Image.fromarray(photo), task=task, **extra).images[0])
    if task == "uncropping":
        assert out.shape == (165, 210, 3) and np.array_equal(out[15:, 10:], photo)
    else:
        assert out.shape == photo.shape
    if task == "inpainting":
        kept = extra["mask_image"] == 0
        assert np.array_equal(out[kept], photo[kept]) and (out[~kept] != photo[~kept]).any()


def test_colorization_keeps_the_photographs_luma(pipe, photo):
    gray = np.asarray(Image.fromarray(photo).convert("L"))
    out = pipe(gray, task="colorization", output_type="pt").images
    expected = torch.from_numpy(gray.astype(np.float32)) / 127.5 - 1
    assert (luma(out)[0, 0] - expected).abs().max() < 1 / 255
    assert not is_gray(out).all()


@pytest.mark.parametrize("task", TASKS[1:])
def test_gray_stays_gray(pipe, task, photo):
    gray = np.asarray(Image.fromarray(photo).convert("L"))
    out = np.asarray(pipe(gray, task=task, **options(task, photo)).images[0].convert("RGB")).astype(int)
    assert (out.max(-1) - out.min(-1)).max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_alone_or_in_a_batch(pipe, task, photo):
    extra = options(task, photo)
    if "mask_image" in extra:
        extra["mask_image"] = [extra["mask_image"]] * 3
    images = [photo, photo[::-1].copy(), photo[:, ::-1].copy()]
    seeds = [torch.Generator().manual_seed(i) for i in (5, 6, 7)]
    batch = pipe(images, task=task, generator=seeds, output_type="pt", **extra).images
    if "mask_image" in extra:
        extra["mask_image"] = extra["mask_image"][0]
    alone = pipe(images[1], task=task, generator=torch.Generator().manual_seed(6), output_type="pt", **extra).images
    assert (batch[1] - alone[0]).abs().max() <= 2 / 255
    assert (batch[0] - batch[1]).abs().max() > 0.01


def test_photographs_of_like_shape_are_one_batch(pipe, photo):
    """Of whatever size: each comes back in its own, as if it were alone; another shape waits for its turn."""
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    images = [photo, photo[:60, :100], photo[::2, ::2].copy(), photo[:148, :198].copy()]
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    out = pipe(images, generator=seeds, output_type="pt", num_images_per_input=2).images
    assert batches == [6, 6, 2, 2]
    assert [tuple(x.shape[-2:]) for x in out[::2]] == [image.shape[:2] for image in images]
    alone = pipe(images[2], generator=torch.Generator().manual_seed(2), output_type="pt", num_images_per_input=2).images
    assert max((a - b).abs().max() for a, b in zip(alone, out[4:6], strict=True)) <= 2 / 255


def test_tasks_are_mixed_in_one_call(pipe, photo, seeded):
    """Each picture is what its task makes of it alone; those of one task and shape are one batch."""
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    tasks = ["colorization", "inpainting", "uncropping", "colorization"]
    hole = options("inpainting", photo)["mask_image"]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    masks, images = [None, hole, None, None], [photo, photo, photo, photo[::-1].copy()]
    out = pipe(images, task=tasks, mask_image=masks, left=16, generator=seeds(), output_type="pt").images
    assert [tuple(x.shape[-2:]) for x in out] == [(150, 200), (150, 200), (150, 216), (150, 200)]
    assert batches[:2] == [2, 2] and set(batches[2:]) == {1}
    for i, extra in enumerate([{}, {"mask_image": hole}, {"left": 16}, {}]):
        alone = pipe(images[i], task=tasks[i], generator=seeds()[i], output_type="pt", **extra).images[0]
        assert (out[i] - alone).abs().max() <= 2 / 255
    with pytest.raises(ValueError, match="2 tasks came for 3 images"):
        pipe([photo] * 3, task=tasks[:2])
    with pytest.raises(ValueError, match="'colorization' takes no mask_image"):
        pipe(images, task=tasks, mask_image=[hole] * 4, left=16)


def test_variations(pipe, photo):
    def run(seed):
        g = torch.Generator().manual_seed(seed)
        return pipe(photo, num_images_per_input=3, generator=g, output_type="pt").images

    first = run(0)
    assert first.shape == (3, 3, 150, 200)
    assert (first[0] - first[1]).abs().max() > 0.01
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))


def test_kinds_of_input_and_output(pipe, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")

    def run(image, **extra):
        return pipe(image, generator=torch.Generator().manual_seed(0), **extra).images

    expected = np.asarray(run(photo)[0])
    tensor = torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 127.5 - 1
    for image in (Image.fromarray(photo), str(tmp_path / "a.png"), tmp_path / "a.png", photo / 255, tensor):
        assert np.abs(np.asarray(run(image)[0]).astype(int) - expected).max() <= 1
    assert run(photo, output_type="np").shape == (1, 150, 200, 3)
    assert isinstance(pipe(photo, return_dict=False), tuple)
    assert len(run([photo, photo[:50]], output_type="pt")) == 2


def test_image_from_a_url(pipe, photo, tmp_path):
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    Image.fromarray(photo).save(tmp_path / "a.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        out = pipe(f"http://127.0.0.1:{server.server_port}/a.png", num_inference_steps=1).images[0]
    finally:
        server.shutdown()
    assert out.size == (200, 150)


def test_a_transparent_hole_becomes_opaque(pipe, photo):
    alpha = np.full((*photo.shape[:2], 1), 255, np.uint8)
    alpha[60:80, 60:80] = 0
    out = pipe(np.concatenate([photo, alpha], -1), task="inpainting", mask_image="alpha").images[0]
    assert out.mode == "RGB" and (np.asarray(out)[:60] == photo[:60]).all()


def test_alpha_orientation_and_tiny_pictures(pipe, photo):
    rgba = np.concatenate([photo, photo[..., :1]], -1)
    out = pipe(Image.fromarray(rgba), task="jpeg_restoration").images[0]
    assert out.mode == "RGBA" and np.array_equal(np.asarray(out)[..., 3], photo[..., 0])
    for size in ((1, 1), (1, 40), (7, 3)):
        for task in ("colorization", "jpeg_restoration"):
            assert pipe(np.zeros(size, np.uint8), task=task).images[0].size == size[::-1]
    mask = np.zeros((3, 5), np.uint8)
    mask[1, 1] = 255
    assert pipe(photo[:3, :5], task="inpainting", mask_image=mask).images[0].size == (5, 3)


def test_callback_sees_the_predicted_original(pipe, photo):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["pred_original_sample"].abs().max().item(), sorted(tensors)))
        return tensors

    pipe(photo, num_inference_steps=3, callback_on_step_end=callback)
    assert [s[0] for s in seen] == [0, 1, 2] and all(s[1] <= 1 for s in seen)
    assert seen[0][2] == ["pred_original_sample", "sample"]
    seen.clear()
    pipe(photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pred_original_sample"])
    assert seen[0][2] == ["pred_original_sample"]
    with pytest.raises(ValueError, match=r"\['latents'\], expected names of \['sample'"):
        pipe(photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])


def test_latents_are_the_start(pipe, photo):
    image = torch.from_numpy(photo[:32, :32].copy()).permute(2, 0, 1).float() / 127.5 - 1

    def run(latents, seed=0):
        return pipe(image, task="jpeg_restoration", num_inference_steps=1, latents=latents, output_type="pt",
            generator=torch.Generator().manual_seed(seed)).images  # fmt: skip

    latents = torch.randn(1, 3, 32, 32)
    assert torch.equal(run(latents, 0), run(latents, 1)) and not torch.equal(run(latents), run(-latents))
    with pytest.raises(ValueError, match="latents are"):
        run(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "solver", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_every_solver(pipe, photo, solver):
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config)
    out = pipe(photo, task="jpeg_restoration", num_inference_steps=4, output_type="pt").images
    assert torch.isfinite(out).all() and out.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(photo, dtype):
    def run(dtype):
        pipe = PalettePipeline(toy_unet().to(dtype), PaletteScheduler(sampling_spacing="logsnr"))
        pipe.set_progress_bar_config(disable=True)
        return pipe(photo, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images

    assert (run(dtype) - run(torch.float32)).abs().mean() < 0.02


def test_own_task_object(pipe, photo):
    class Same(Task):
        name = "same"

    assert pipe(photo, task=Same()).images[0].size == (200, 150)


def test_save_and_load(pipe, photo, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = PalettePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.tasks == list(TASKS) and loaded.config.default_steps == 2

    def run(p):
        return p(photo, generator=torch.Generator().manual_seed(0), output_type="pt").images

    # weights read from a file lie differently in memory, which may change the order of sums
    assert (run(loaded) - run(pipe)).abs().max() < 1 / 255


def test_known_pixels_guide_every_step(pipe, photo):
    """The predicted picture that the sampler steps from holds the known pixels and the photograph's luma."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    image = torch.from_numpy(photo[:32, :32].copy()).permute(2, 0, 1).float() / 127.5 - 1
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["pred_original_sample"])
        return tensors

    pipe(image, task="inpainting", mask_image=mask, num_inference_steps=3, callback_on_step_end=callback)
    kept = torch.from_numpy(mask == 0).expand(3, -1, -1)
    assert all(torch.equal(x[0][kept], image[kept]) for x in seen) and len(seen) == 3
    seen.clear()
    pipe(image, task="colorization", num_inference_steps=3, callback_on_step_end=callback)
    assert all((luma(x[0]) - luma(image)).abs().max() < 1e-4 for x in seen) and len(seen) == 3


@pytest.mark.parametrize("solver", [None, "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_sampling_can_start_from_an_estimate(solver):
    """A network that knows the picture brings it back, in fewer steps; with none left, the estimate returns."""
    scheduler = PaletteScheduler(sampling_spacing="logsnr")
    pipe = PalettePipeline(toy_unet(), scheduler)
    if solver:
        pipe.scheduler = getattr(diffusers, solver).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    calls, given = [], Given(known=picture, condition=picture)

    def knows(sample, gamma, condition):
        calls.append(float(gamma))
        return output_for(picture, sample, gamma, "epsilon")

    out = pipe.denoise(given, torch.Generator().manual_seed(0), 16, predict=knows, estimate=picture, start=0.0)
    assert 1 / (1 + np.exp(0.01)) < calls[0] < 0.8 and 3 < len(calls) < 14 * pipe.scheduler.order
    assert (out - picture).abs().mean() < 0.05
    again = pipe.denoise(given, None, 16, predict=knows, estimate=picture, start=99.0)
    assert torch.equal(again, picture)


def test_a_restart_may_be_calmer_than_the_start(pipe, photo, seeded):
    """`restart_noise` is for what starts from an estimate alone; without it, `initial_noise` is for both."""
    given = tasks_given(photo)
    estimate = torch.zeros_like(given.known)
    for config, expected in ((dict(initial_noise=1.0, restart_noise=0.25), 0.25), (dict(initial_noise=0.5), 0.5)):
        pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", **config)
        seen = []
        for start in (estimate, None):
            predict = lambda y, gamma, x: seen.append((y, gamma)) or torch.zeros_like(y)  # noqa: B023, E731
            pipe.denoise(given, seeded(1), 8, predict=predict, estimate=start, start=0.0)
        restart, begin = seen[0], next(s for s in seen[1:] if s[1] == min(g for _, g in seen))
        assert (restart[0] / (1 - restart[1]).sqrt()).std().item() == pytest.approx(expected, rel=0.05)
        assert begin[0].std().item() == pytest.approx(config["initial_noise"], rel=0.05)


def first_seen(pipe, image, seeded, steps=4, **options):
    """The noisy image that the network is shown first."""
    seen, predict = [], pipe._predict
    pipe._predict = lambda y, *rest: seen.append(y) or predict(y, *rest)
    pipe(image, num_inference_steps=steps, generator=seeded(1), **options)
    pipe._predict = predict
    return seen[0]


@pytest.mark.parametrize("solver", [None, "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_borders_of_larger_photographs_may_start_calmer(pipe, photo, seeded, solver):
    """`border_noise` is for the smallest level of a border alone: not for holes, not at the network's own size."""
    own = PaletteScheduler(sampling_spacing="logsnr", border_noise=0.5)
    pipe.scheduler = own if solver is None else getattr(diffusers, solver).from_config(own.config)
    right = {"task": "uncropping", "right": 16}
    hole = {"task": "inpainting", "mask_image": "8,8,24,24"}
    for side, options, expected in ((64, right, 0.5), (32, right, 1.0), (24, right, 1.0), (64, hole, 1.0)):
        first = first_seen(pipe, photo[:side, : side - options.get("right", 0)], seeded, **options)
        assert first.std().item() == pytest.approx(expected, rel=0.1), (side, options)


@pytest.mark.parametrize("solver", [None, "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_task_may_start_with_noise_of_its_own(pipe, photo, seeded, solver, tmp_path):
    """It survives saving, holds for other solvers, and gives way where a larger photograph has a `border_noise`."""
    noise = {"colorization": 0.5, "uncropping": 0.25, "jpeg_restoration": 0.6}
    own = PaletteScheduler(sampling_spacing="logsnr", task_noise=noise, border_noise=0.75)
    pipe.scheduler = own if solver is None else getattr(diffusers, solver).from_config(own.config)
    pipe.save_pretrained(tmp_path)
    pipe = PalettePipeline.from_pretrained(tmp_path)
    right, hole = {"right": 8}, {"mask_image": "8,8,24,24"}
    for task, side, options, expected in (
        ("colorization", 32, {}, 0.5), ("inpainting", 32, hole, 1.0), ("uncropping", 32, right, 0.25),
        ("uncropping", 64, right, 0.75), ("colorization", 64, {}, 0.5),
    ):  # fmt: skip
        first = first_seen(pipe, photo[:side, : side - options.get("right", 0)], seeded, task=task, **options)
        assert first.std().item() == pytest.approx(expected, rel=0.1), (task, side)


def test_a_task_may_begin_at_a_level_of_its_own(pipe, photo, tmp_path):
    """It survives saving; a solver of the library, which has its own levels, keeps them."""
    own = PaletteScheduler(sampling_spacing="logsnr", logsnr_max=6.0, task_logsnr_min={"inpainting": -12.0})

    def levels(pipe, **options):
        taken = []

        def callback(pipe, step, timestep, tensors):
            taken.append(float(torch.logit(noise_level(pipe.scheduler, timestep).double())))
            return {}

        pipe(photo[:32, :32], num_inference_steps=4, callback_on_step_end=callback, **options)
        return taken

    hole = {"task": "inpainting", "mask_image": "8,8,24,24"}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(own.config)
    others = levels(pipe, **hole)
    assert others == levels(pipe, task="uncropping", right=8)
    pipe.scheduler = PaletteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    pipe = PalettePipeline.from_pretrained(tmp_path)
    assert levels(pipe, **hole) == pytest.approx([-12, -6, 0, 6], abs=1e-3)
    assert levels(pipe, task="colorization") == pytest.approx([-9, -4, 1, 6], abs=1e-3)
    pipe.scheduler.set_timesteps(4)
    assert float(torch.logit(pipe.scheduler.gamma(3).double())) == pytest.approx(-9, abs=1e-3)


def test_a_start_from_the_source_has_its_tasks_noise(pipe, photo, seeded):
    starts = []
    for own in ({}, {"task_noise": {"jpeg_restoration": 0.5}}, {"initial_noise": 0.5}):
        pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr", **own)
        starts.append(first_seen(pipe, photo[:32, :32], seeded, 10, task="jpeg_restoration"))
    assert torch.equal(starts[1], starts[2]) and not torch.equal(starts[0], starts[1])


def tasks_given(photo):
    image = torch.from_numpy(photo[:64, :64].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return Given(known=image, condition=image)


def test_a_task_may_start_from_its_source(pipe, photo):
    """JPEG restoration leaves out the noisiest steps; with too few of them (of two, the one left would see no
    damage any more), it takes all, from noise."""
    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr")
    taken = []

    def callback(pipe, step, timestep, tensors):
        taken.append(int(timestep))
        return tensors

    for steps, expected in ((10, [6, 5, 4, 3, 2, 1, 0]), (3, [1, 0]), (2, [1, 0]), (1, [0])):
        taken.clear()
        pipe(photo[:32, :32], task="jpeg_restoration", num_inference_steps=steps, callback_on_step_end=callback)
        assert taken == expected
    taken.clear()
    pipe(photo[:32, :32], task="colorization", num_inference_steps=10, callback_on_step_end=callback)
    assert len(taken) == 10


def test_holes_are_refined_up_to_the_photographs_resolution(pipe):
    """A hole across a large picture: every level up to its own resolution is seen, and no border shows."""
    sizes_seen, predict = [], pipe._predict

    def watching(sample, gamma, condition):
        sizes_seen.append(sample.shape[-1])
        return predict(sample, gamma, condition)

    pipe._predict = watching
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["sample"].shape[-1])
        return tensors

    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr")
    image = np.full((200, 200, 3), 100, np.uint8)
    mask = np.zeros((200, 200), np.uint8)
    mask[60:150, 60:150] = 255
    out = pipe(image, task="inpainting", mask_image=mask, num_inference_steps=6, callback_on_step_end=callback)
    widths = sorted(set(seen))
    assert widths[0] == 32 and widths[-1] >= 160 and len(widths) == 3
    assert max(sizes_seen) == 64  # in tiles of up to twice the model's size
    inside = np.asarray(out.images[0])[60:150, 60:150].astype(float)
    ring = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    assert abs(ring.mean() - 100) < 4 and inside.std() > 1


def test_holes_apart_have_views_of_their_own(pipe):
    """Two small holes in the corners of a large picture are seen at their own resolution."""
    image = np.random.default_rng(0).integers(0, 255, (600, 800, 3), np.uint8)
    mask = np.zeros((600, 800), np.uint8)
    mask[20:32, 30:45] = mask[560:570, 760:780] = 255
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["sample"].shape[-2:]))
        return tensors

    arguments = dict(task="inpainting", mask_image=mask, num_inference_steps=2)
    out = np.asarray(pipe(image, callback_on_step_end=callback, **arguments).images[0])
    assert np.array_equal(out[mask == 0], image[mask == 0]) and (out[mask > 0] != image[mask > 0]).any()
    assert len(seen) >= 4 and max(max(s) for s in seen) <= 48
    with pytest.raises(ValueError, match="2 holes apart"):
        pipe(image, latents=torch.zeros(1, 3, 32, 32), **arguments)


def test_a_panorama_costs_by_its_width(pipe, photo):
    """Eight times as wide: in stages, whose views do not grow, so that the cost does with the width alone."""
    calls = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    costs = []
    for right in (1.0, 4.0, 8.0):
        calls.clear()
        out = pipe(photo[:64, :64], task="uncropping", right=right, output_type="pt").images[0]
        assert out.shape == (3, 64, round(64 * (1 + right))) and torch.isfinite(out).all()
        assert max(shape[-1] * shape[-2] for shape in calls) <= 64 * 64 * 2
        costs.append(sum(shape[0] * shape[-1] * shape[-2] for shape in calls))
    assert 5 < costs[2] / costs[0] < 9.6 and 2.5 < costs[1] / costs[0] < 4.8
    assert torch.equal(out[:, :, :64], torch.from_numpy(photo[:64, :64].copy()).permute(2, 0, 1) / 127.5 - 1)
    wide = pipe(photo[:64, :48], task="uncropping", aspect=1.5, output_type="pt").images[0]
    assert wide.shape == (3, 64, 96)


def test_a_fill_has_the_grain_of_its_photograph(pipe, seeded):
    """What was brought up from the model's size would be as smooth as that; a calm photograph gets none."""
    calm = torch.linspace(-0.5, 0.5, 256).expand(1, 3, 256, 256).clone()
    grainy = (calm + 0.1 * torch.randn(1, 1, 256, 256, generator=seeded(1))).clamp(-1, 1)
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 80:176, 80:176] = 1
    pipe.scheduler = PaletteScheduler(prediction_type="sample", sampling_variance="zero")
    pipe.unet.forward = lambda sample, gamma, condition, return_dict=False: (torch.zeros_like(sample),)
    levels = []
    for image in (calm, grainy):
        out = pipe(image[0], task="inpainting", mask_image=mask, generator=seeded(2), output_type="pt").images
        levels.append(sizes.grain(out, mask).item())
    assert levels[0] < 0.02 and levels[1] == pytest.approx(0.1, rel=0.25)


def test_scratches_on_a_large_picture(pipe):
    """Too thin for the coarse view, they are filled at the finer ones, from the picture around."""
    pipe.scheduler = PaletteScheduler(sampling_spacing="logsnr")
    image = np.full((130, 160, 3), (90, 120, 150), np.uint8)
    mask = np.zeros((130, 160), np.uint8)
    mask[20:110:9, 30:130] = 255
    out = np.asarray(pipe(image, task="inpainting", mask_image=mask, num_inference_steps=4).images[0]).astype(int)
    assert np.array_equal(out[mask == 0], image[mask == 0])
    assert (out[mask > 0] != image[mask > 0]).any() and np.abs(out[mask > 0].mean(0) - image[0, 0]).max() < 12


@pytest.mark.parametrize("task", TASKS)
def test_a_network_that_is_told_its_holes(photo, task):
    """The whole way, with the fill of each finer level as the coarser one's picture."""
    unet = toy_unet(condition_skip=0.2, hole_skip=0.5)
    pipe = PalettePipeline(unet, PaletteScheduler(prediction_type="v_prediction", sampling_spacing="logsnr"))
    pipe.set_progress_bar_config(disable=True)
    told, predict = [], pipe._predict

    def watching(sample, gamma, condition):
        told.append(condition)
        return predict(sample, gamma, condition)

    pipe._predict = watching
    out = pipe(photo, task=task, num_inference_steps=4, num_images_per_input=2, **options(task, photo)).images
    assert len(out) == 2 and all(x.shape[1] == 4 and x.abs().max() <= 1 for x in told)
    assert any(x[:, 3].any() for x in told) == (task in ("inpainting", "uncropping"))


def test_cpu_offload_needs_an_accelerator(pipe):
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="accelerator"):
            pipe.enable_model_cpu_offload()


def test_nan_never_leaves(pipe, photo):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite after step 1 of 2"):
        pipe(photo)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"task": "colorise"}, "this checkpoint knows colorization"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"task": "inpainting"}, "needs a mask_image"),
        ({"task": "inpainting", "mask_image": np.ones((3, 3), np.uint8)}, "must have the same size"),
        ({"mask_image": np.ones((150, 200), np.uint8)}, "takes no mask_image"),
        ({"task": "uncropping"}, "all zero"),
        ({"task": "uncropping", "left": -1}, "at least 0"),
        ({"task": "uncropping", "left": float("nan")}, "left is nan"),
        ({"task": "uncropping", "left": 64.0}, "left is 64, a fraction of the side: 6400% of it; pixels are whole"),
        ({"task": "uncropping", "left": 400_000}, "the limit is 50000000 pixels"),
        ({"left": 4}, "belong to 'uncropping'"),
        ({"num_images_per_input": 0}, "at least 1"),
        ({"output_type": "jpg"}, "expected 'pil'"),
        ({"generator": [torch.Generator()] * 2}, "2 generators came for 1"),
        ({"max_pixels": 100}, "the limit is 100"),
    ],
)
def test_bad_input(pipe, photo, extra, message):
    with pytest.raises(ValueError, match=message):
        pipe(Image.fromarray(photo), **extra)


def test_bad_checkpoints(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        PalettePipeline.from_pretrained(tmp_path / "none")
    pipe.save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError):
        PalettePipeline.from_pretrained(tmp_path / "a")


def test_the_starters_student_ships_and_runs(photo):
    pipe = PalettePipeline.from_pretrained("starter-few-steps")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32 and pipe.config.default_steps == 4
    clean = torch.from_numpy(photo[:64, :64].copy()).permute(2, 0, 1).float() / 127.5 - 1
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:40] = 1
    for steps in (1, 2, 4):
        out = pipe(clean, task="inpainting", mask_image=mask, num_inference_steps=steps, output_type="pt").images[0]
        assert torch.equal(out[:, :20], clean[:, :20]) and (out - clean)[:, 20:40, 20:40].abs().mean() < 0.5


def test_the_student_is_the_starter_with_adapters(tmp_path):
    """As PEFT merges them; the two together are at most 32 MiB."""
    pytest.importorskip("peft")
    student = PalettePipeline.from_pretrained("starter-few-steps").unet
    starter = PalettePipeline.from_pretrained().unet
    before = starter.mid_block.resnets[0].conv1.weight.clone()
    starter.load_lora_adapter(str(STUDENT / "lora"), prefix=None, use_safetensors=True)
    starter.fuse_lora()
    starter.unload_lora()
    for name, weight in starter.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, msg=name, atol=1e-6, rtol=1e-5)
    assert (student.mid_block.resnets[0].conv1.weight - before).abs().max() > 1e-3
    assert sum(f.stat().st_size for place in (STARTER, STUDENT) for f in place.rglob("*") if f.is_file()) <= 32 * 2**20
    half = PalettePipeline.from_pretrained("starter-few-steps", dtype=torch.bfloat16).unet
    assert half.dtype == torch.bfloat16


def test_starter_ships_and_runs(photo, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    size = sum(f.stat().st_size for f in STARTER.rglob("*") if f.is_file())
    assert size <= 24 * 2**20
    pipe = PalettePipeline.from_pretrained()
    named = PalettePipeline.from_pretrained(os.path.relpath(STARTER))  # as `--init` names it
    assert torch.equal(named.unet.conv_in.weight, pipe.unet.conv_in.weight)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.tasks == list(TASKS)
    clean = torch.from_numpy(photo[:64, :64].copy()).permute(2, 0, 1).float() / 127.5 - 1
    out = pipe(clean, task="jpeg_restoration", num_inference_steps=4, output_type="pt").images[0]
    # a trained network returns the picture that it is shown, not noise
    assert (out - clean).abs().mean() < 0.25


def test_nan_of_a_callback_does_not_leave(pipe, photo):
    def spoil(pipe, step, timestep, tensors):
        return {"sample": tensors["sample"] * float("nan")} if step == 1 else {}

    with pytest.raises(FloatingPointError, match="not finite after step 2 of 2"):
        pipe(photo, callback_on_step_end=spoil)


EXTREME = {
    "black": np.zeros((40, 52, 3), np.uint8),
    "white": np.full((40, 52, 3), 255, np.uint8),
    "checkerboard": (np.indices((40, 52)).sum(0)[..., None] % 2 * 255).repeat(3, -1).astype(np.uint8),
    "pixel": np.full((1, 1, 3), 200, np.uint8),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spacing", "steps"), [("paper", 1), ("paper", 3), ("logsnr", 2)])
def test_extreme_pictures_in_half_precision(dtype, spacing, steps):
    """The paper's spacing begins at gamma = 6.6e-21, the last levels round to 1."""
    pipe = PalettePipeline(toy_unet().to(dtype), PaletteScheduler(sampling_spacing=spacing))
    pipe.set_progress_bar_config(disable=True)
    for name, picture in EXTREME.items():
        out = pipe(picture, "colorization", num_inference_steps=steps, output_type="pt").images[0]
        assert torch.isfinite(out).all() and out.abs().max() <= 1, name
        assert (luma(out) - luma(canvas.read(picture).image[0])).abs().max() < 1e-3, name


def in_blocks(pipe, monkeypatch, *arguments, **options):
    """The same in one block, and in several."""

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe(*arguments, output_type="pt", generator=generator, **options).images

    whole = run()
    monkeypatch.setattr(sizes, "BLOCK", 160)
    return whole, run()


def test_a_large_jpeg_is_mended_in_blocks(pipe, photo, monkeypatch, tmp_path):
    """By a network that gives its source back, the same as at once, held to the file too."""
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=20)
    monkeypatch.setattr(pipe, "_predict", lambda sample, gamma, condition: condition)
    pipe.scheduler.register_to_config(prediction_type="sample")
    for consistent in (False, True):
        with monkeypatch.context() as patch:
            whole, parts = in_blocks(
                pipe, patch, tmp_path / "a.jpg", task="jpeg_restoration", consistent=consistent, num_images_per_input=2
            )
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="sampled in 2 blocks, each on its own"):
        patch.setattr(sizes, "BLOCK", 160)
        pipe(photo, task="jpeg_restoration", latents=torch.zeros(1, 3, 160, 208))


@pytest.mark.parametrize(
    ("task", "solver"),
    [(JPEG, "ours"), (JPEG, "DDIMScheduler"), (JPEG, "DPMSolverMultistepScheduler"), ("inpainting", "ours")],
)
def test_blocks_have_the_same_new_noise_where_they_overlap(pipe, photo, monkeypatch, task, solver):
    """By a network that looks at single pixels, what two blocks make of one pixel is the same."""
    monkeypatch.setattr(pipe, "_predict", lambda sample, gamma, condition: 0.6 * sample)
    settings = dict(sampling_spacing="logsnr", sampling_variance="zero", source_eta=0.5, sampling_order=2)
    pipe.scheduler = PaletteScheduler(**settings)
    if solver != "ours":
        more = {"algorithm_type": "sde-dpmsolver++"} if solver.startswith("DPM") else {}
        pipe.scheduler = build(getattr(diffusers, solver), pipe.scheduler.config, **more)
    parts, lay, options = [], sizes.lay, {"eta": 0.7} if solver in ("ours", "DDIMScheduler") else {}
    if task == "inpainting":
        options["mask_image"] = np.pad(np.full((130, 180), 255, np.uint8), 10)
    monkeypatch.setattr(sizes, "lay", lambda out, part, block: parts.append((block, part)) or lay(out, part, block))
    monkeypatch.setattr(sizes, "BLOCK", 160)
    pipe(photo, task=task, num_inference_steps=16, texture=False if task == "inpainting" else None, **options)
    (a, one), (b, two) = parts[-2:]
    lap = a.left + a.width - b.left
    assert lap > 20 and a.top == b.top
    one, two = one[..., -lap:], two[..., :lap]
    assert one.std() > 0.02
    if task == "inpainting":  # what was laid before is known to the next block; with unlike noise it would be 0.1
        assert (one - two).abs().mean() < 0.04
    else:
        assert (one - two).abs().max() < 1e-4


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_a_large_hole_is_filled_in_blocks(pipe, photo, monkeypatch, task):
    """The same to what the noise makes of it; what is known is kept to the bit, gray stays gray, and colour colour."""
    monkeypatch.setattr(pipe, "_predict", lambda sample, gamma, condition: 0.6 * sample + 0.2 * condition)
    photo, mask = np.tile(photo, (2, 1, 1)), np.zeros((300, 200), np.uint8)
    mask[40:260, 30:170] = 255
    options = {"mask_image": mask} if task == "inpainting" else {"right": 90, "top": 30}
    keep = mask == 0 if task == "inpainting" else np.ones_like(mask, bool)
    inside = (..., slice(options.get("top", 0), None), slice(0, 200))
    known, keep = canvas.read(photo).image[0], torch.from_numpy(keep)
    for image, colored in ((photo, True), (photo[..., 0], False)):
        with monkeypatch.context() as patch:
            whole, parts = in_blocks(pipe, patch, image, task=task, num_images_per_input=2, **options)
        wanted = known if colored else known[:1].expand(3, -1, -1)
        for out in (whole, parts):
            assert torch.equal(out[inside][..., keep], wanted[..., keep].expand(2, -1, -1))
            assert (out[:, 0] != out[:, 1]).any() == colored
        assert not torch.equal(*parts) and not torch.equal(parts, whole)
        assert (parts - whole).abs().mean() < 0.15


@pytest.mark.parametrize("task", ["colorization", "inpainting", "uncropping", "jpeg_restoration"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_variations_of_a_large_photograph_are_made_one_at_a_time(pipe, photo, monkeypatch, task, output_type):
    """The same pictures, and no more than one of them in the making."""
    more = {"inpainting": {"mask_image": ["10,10,60,50"] * 2}, "uncropping": {"right": 20}}.get(task, {})
    photo = photo[:75, :100]

    def made():
        asked = dict(task=task, num_images_per_input=3, num_inference_steps=2, output_type=output_type, **more)
        images = pipe([photo, photo[:50]], generator=torch.Generator().manual_seed(0), **asked).images
        return [np.asarray(image, np.float32) for image in images]

    together = made()
    monkeypatch.setattr("palette_diffusers.pipeline.AT_ONCE", 10_000)
    restore, numbers = pipe._restore, []
    monkeypatch.setattr(pipe, "_restore", lambda *args: numbers.append(len(args[3][0])) or restore(*args))
    alone = made()
    assert set(numbers) == {1} and len(numbers) == 6
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1 if output_type == "pil" else 1 / 127)
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("at_once", [1, 8_000_000])
def test_what_was_given_is_not_written_to(pipe, photo, monkeypatch, number, at_once):
    """Though holes are filled in place."""
    monkeypatch.setattr("palette_diffusers.pipeline.AT_ONCE", at_once)
    image = torch.from_numpy(photo).permute(2, 0, 1) / 127.5 - 1
    mask = torch.zeros(1, 150, 200)
    mask[:, 20:90, 30:100] = 1
    picture, kept = canvas.read(image), (image.clone(), mask.clone())
    for given in (image, picture):
        options = dict(mask_image=mask, num_images_per_input=number, num_inference_steps=2, output_type="pt")
        images = pipe(given, task="inpainting", generator=torch.Generator().manual_seed(0), **options).images
        assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1]) and torch.equal(picture.image[0], kept[0])
        assert all(not torch.equal(x, image) for x in images)
        assert number == 1 or not torch.equal(images[0], images[1])


@pytest.mark.parametrize("task", ["colorization", "uncropping", "jpeg_restoration", "inpainting"])
def test_what_nobody_sees_has_no_part_in_the_result(pipe, photo, seeded, task):
    """Under full transparency anything may lie; it stays there to the bit, and changes nothing that is seen."""
    options = {"uncropping": {"left": 0.25}, "inpainting": {"mask_image": "40,40,60,60"}}.get(task, {})
    shown = []
    for hidden in (0, 255):
        pixels = np.dstack([photo[:96, :120], np.full((96, 120), 255, np.uint8)])
        pixels[:, :30] = (hidden, hidden, hidden, 0)
        out = np.asarray(pipe(Image.fromarray(pixels), task=task, generator=seeded(0), **options).images[0])
        width = out.shape[1] - 120
        assert out.shape == (96, 150 if task == "uncropping" else 120, 4)
        assert (out[:, width : width + 30, :3] == hidden).all(), "what was there"
        assert (out[:, : width + 30, 3] == 0).all(), "beside what is transparent, the border is"
        assert (out[:, width + 30 :, 3] == 255).all()
        shown.append(out[:, width + 30 :, :3])
    assert np.array_equal(*shown)


@pytest.mark.parametrize("mask", ["#ff00ff", "30,20,60,40", "alpha"])
def test_a_hole_may_be_where_nobody_sees_anything(pipe, photo, seeded, mask):
    pixels = np.dstack([photo[:64, :96], np.full((64, 96), 255, np.uint8)])
    pixels[20:40, 30:60] = (255, 0, 255, 0)
    out = pipe(pixels, task="inpainting", mask_image=mask, generator=seeded(0), output_type="np").images[0]
    hole = np.abs(out[20:40, 30:60] - [1, 0, 1]).max(-1)
    assert (hole > 0.02).mean() > 0.9, "made anew"
    out[20:40, 30:60] = pixels[20:40, 30:60, :3] / 255
    np.testing.assert_allclose(out, pixels[..., :3] / 255, atol=1e-6)


def test_a_batch_of_masks_as_a_tensor(pipe, photo, seeded):
    images = torch.from_numpy(np.stack([photo[:64, :64], photo[30:94, 60:124]])).permute(0, 3, 1, 2) / 127.5 - 1
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 10:20, 10:20] = masks[1, :, 30:50, 30:50] = 1
    both = pipe(images, task="inpainting", mask_image=masks, output_type="pt").images
    assert ((both != images).any(1) <= (masks[:, 0] > 0)).all() and (both != images).flatten(1).any(1).all()


def test_numbers_beyond_all_sense(pipe, photo):
    for options in ({"right": 1e308}, {"aspect": 1e308}, {"aspect": float("nan")}):
        with pytest.raises(ValueError, match="expected"):
            pipe(photo[:32, :32], task="uncropping", **options)


def test_a_border_continues_what_it_meets():
    """Made at once, the dark shore beneath a sky ended in haze after a few pixels: 14 to 27 of its 150 levels were left
    at the new border, in strips 114 to 135 are."""
    pier = Image.open(STARTER.parent / "photographs" / "pier.jpg").convert("RGB").resize((240, 160))
    pipe = PalettePipeline.from_pretrained(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(pier, task="uncropping", right=0.25, generator=generator, output_type="pt").images
    light = luma(out)[0, 0] * 127.5
    shown, made = (
        light[50:62, part].mean() - light[66:76, part].amin(0).mean() for part in (slice(200, 240), slice(270, 300))
    )
    assert shown > 140 and made > 0.5 * shown, (shown, made)


def test_an_index_that_is_none_and_a_folder_of_a_run(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(FileNotFoundError, match=re.escape(f"did you mean {tmp_path / 'pipeline'}?")):
        PalettePipeline.from_pretrained(tmp_path)
    index = tmp_path / "pipeline" / "model_index.json"
    for text in ("[1]", '{"_format": "x"}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            PalettePipeline.from_pretrained(tmp_path / "pipeline")


def test_a_line_along_an_edge_does_not_go_on(pipe, photo, tmp_path, seeded):
    """It is in the result, and had no part in it; it is told. One along a side that stays is the picture's."""
    lined = photo.copy()
    lined[:, -3:], lined[:2] = 0, 255
    behind = lined.copy()
    behind[:, -3:] = behind[:, -4:-3]

    def extend(picture, **options):
        return np.asarray(pipe(picture, "uncropping", right=20, generator=seeded(), **options).images[0])

    with pytest.warns(canvas.LossWarning, match="a line along its edge, 3 pixels wide at the right: trim makes"):
        out = extend(lined)
    assert np.array_equal(out[:, :200], lined)
    assert np.array_equal(out[:, 200:], extend(behind)[:, 200:])
    out = extend(lined, trim=True)  # the line at the top is not extended
    assert np.array_equal(out[:, :197], lined[:, :197]) and (out[2:, 197:200] > 40).mean() > 0.8
    out = extend(lined, trim=True, top=0.001)  # which is no pixel
    assert np.array_equal(out[:, :197], lined[:, :197])
    Image.fromarray(lined).save(tmp_path / "scan.png")
    with pytest.warns(canvas.LossWarning, match="scan.png has a line"):
        extend(tmp_path / "scan.png")
    with pytest.raises(ValueError, match="trim belongs to 'uncropping'"):
        pipe(photo, "colorization", trim=True)
    alpha = np.full(lined.shape[:2], 255, np.uint8)
    alpha[40:60, 150:] = 0
    clear = np.dstack([lined, alpha])
    with pytest.warns(canvas.LossWarning):
        out = extend(clear)
    assert np.array_equal(out[:, :200], clear)
