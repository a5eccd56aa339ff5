"""Half precision at both ends of gamma, 1 to 2000 steps, every solver, extreme pictures; what is not finite is told."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import toy_unet
from test_scheduler import SOLVERS

from palette_diffusers import PalettePipeline, PaletteScheduler, canvas, get_task
from palette_diffusers.scheduler import condition_velocity, diffuse, output_for, predicted_original, training_target

KINDS = ("epsilon", "v_prediction", "sample")
HALVES = (torch.float16, torch.bfloat16)
ENDS = (6.6e-21, 4.4e-5, 1 - 2**-24, 1.0)  # where the paper's sampling and training begin, and float32's last two
EXTREME = {
    "black": np.zeros((24, 30, 3), np.uint8),
    "white": np.full((24, 30, 3), 255, np.uint8),
    "checkerboard": (np.indices((24, 30)).sum(0)[..., None] % 2 * 255).repeat(3, -1).astype(np.uint8),
    "two pixels": np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8),
}


def half_network(dtype):
    """One convolution, so that 2000 steps are cheap."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(6, 3, 3, padding=1).to(dtype)
    return lambda sample, gamma, condition: convolution(torch.cat([sample, condition], 1).to(dtype))


@pytest.fixture
def quiet(pipe):
    def build(solver="", **config):
        pipe.scheduler = PaletteScheduler(**config)
        if solver:
            other = getattr(diffusers, solver.split("-")[0])
            pipe.scheduler = other.from_config(pipe.scheduler.config, **SOLVERS[solver])
        return pipe

    return build


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", ["", *SOLVERS])
def test_every_solver_in_any_number_of_steps(quiet, solver, dtype, seeded):
    predict = half_network(dtype)
    for number, steps in enumerate((1, 2, 3, 5, 2000 if dtype == torch.float16 else 200)):
        pipe = quiet(solver, prediction_type=KINDS[number % 3])
        picture = canvas.read(list(EXTREME.values())[number % 3][:8, :8]).image
        task = get_task(("colorization", "inpainting")[number % 2])
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., 2:6, 2:6] = 1
        given = task.prepare(picture, mask, seeded())
        out = pipe.denoise(given, seeded(1), steps, predict=predict, task=task)
        assert out.dtype == torch.float32 and torch.isfinite(out).all() and out.abs().max() < 1.01, steps


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("task", ["colorization", "inpainting", "uncropping", "jpeg_restoration"])
def test_extreme_pictures(task, dtype):
    """From gamma = 6.6e-21 on."""
    pipe = PalettePipeline(toy_unet().to(dtype), PaletteScheduler())
    pipe.set_progress_bar_config(disable=True)
    for name, picture in EXTREME.items():
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[-12:, -1:] = 255
        options = {"inpainting": dict(mask_image=mask), "uncropping": dict(right=5)}.get(task, {})
        out = pipe(picture, task, num_inference_steps=2, output_type="pt", **options).images[0]
        assert torch.isfinite(out).all() and out.abs().max() <= 1, name


@pytest.mark.parametrize("gamma", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_formulas_at_both_ends_of_gamma(kind, gamma, seeded):
    """Of float16, computed in float32, whose own error at these levels bounds what comes back."""
    y0 = torch.rand(1, 3, 8, 8, generator=seeded()).half() * 2 - 1
    eps = torch.randn(1, 3, 8, 8, generator=seeded(1)).half()
    y = diffuse(y0, eps, gamma)
    output = training_target(y0, eps, gamma, kind)
    again = predicted_original(output, y, gamma, kind)
    assert y.dtype == again.dtype == torch.float32
    for value in (y, output, again, output_for(y0, y, gamma, kind), condition_velocity(y, y0, gamma, 0.2)):
        assert torch.isfinite(value).all()
    signal = {"epsilon": gamma**0.5, "v_prediction": 1.0, "sample": 1.0}[kind]
    assert (again - y0.float()).abs().max() < 1e-6 / signal


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("solver", ["", *SOLVERS])
@pytest.mark.parametrize("task", [None, "colorization"])
def test_the_step_of_what_is_not_finite_is_told(quiet, solver, value, task, seeded):
    """An overflow of float16, too, which a clamped prediction would have hidden."""
    pipe, network, calls = quiet(solver), half_network(torch.float16), []

    def predict(sample, gamma, condition):
        calls.append(gamma)
        return network(sample, gamma, condition) + (value if len(calls) == 3 else 0)

    given = get_task("colorization").prepare(torch.zeros(1, 3, 8, 8))
    task = get_task(task) if task else None
    with pytest.raises(FloatingPointError, match=r"not finite after step 3 of 5"):
        pipe.denoise(given, seeded(), 5, predict=predict, task=task)
