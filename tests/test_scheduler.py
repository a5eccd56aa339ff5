import math

import diffusers
import numpy as np
import pytest
import torch

from palette_diffusers import PaletteScheduler
from palette_diffusers.color import chroma, luma
from palette_diffusers.scheduler import (
    UNFIT,
    WITHOUT_SAMPLE,
    calm,
    check_solver,
    condition_velocity,
    diffuse,
    linear_gammas,
    noise_level,
    output_for,
    predicted_original,
    timestep_of,
    training_target,
    variance_exploding,
)
from palette_diffusers.speed import build
from palette_diffusers.tasks import get_task

SOLVERS = {
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler-sde": {"algorithm_type": "sde-dpmsolver++"},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}


def solver(name, **config):
    scheduler = PaletteScheduler(**config)
    return getattr(diffusers, name.split("-")[0]).from_config(scheduler.config, **SOLVERS[name])


def test_schedules_are_the_papers():
    scheduler = PaletteScheduler()
    assert scheduler.training_gammas[-1] == pytest.approx(4.4e-5, rel=0.02)
    scheduler.set_timesteps(1000)
    assert len(scheduler.timesteps) == 1000
    assert scheduler.gamma(999).item() == pytest.approx(6.6e-21, rel=0.02)
    assert scheduler.gamma(0).item() == pytest.approx(1 - 1e-4, rel=1e-6)


def test_gamma_is_piecewise_uniform(seeded):
    scheduler = PaletteScheduler()
    gamma = scheduler.sample_gamma(200_000, seeded()).double().numpy()
    # t is uniform: the share below gamma_t is (T - t) / T
    for t in (200, 1000, 1800):
        assert np.mean(gamma < scheduler.training_gammas[t]) == pytest.approx(1 - t / 2000, abs=0.005)
    assert gamma.max() < 1 and gamma.min() >= scheduler.training_gammas[-1] * (1 - 1e-6)
    # within one piece, uniform: mean at its middle
    low, high = scheduler.training_gammas[[1000, 900]]
    inside = gamma[(gamma > low) & (gamma < high)]
    expected = np.mean((scheduler.training_gammas[900:1000] + scheduler.training_gammas[901:1001]) / 2)
    assert inside.mean() == pytest.approx(expected, rel=0.005)


def test_ancestral_step_is_algorithm_2_in_float64(seeded):
    """Reference from the paper's formula, in float64, over all 1000 steps with a network that is a function."""
    scheduler = PaletteScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    gammas = linear_gammas(1e-4, 0.09, 1000)
    y = torch.randn(1, 3, 4, 4, generator=seeded()).double()
    worst = 0.0
    for t in scheduler.timesteps.tolist():
        f = math.sqrt(1 - gammas[t + 1]) * y + 0.1 * torch.sin(y)
        alpha = gammas[t + 1] / gammas[t]
        reference = (y - (1 - alpha) / math.sqrt(1 - gammas[t + 1]) * f) / math.sqrt(alpha)
        stepped = scheduler.step(f.float(), t, y.float(), generator=seeded(t)).prev_sample
        if t > 0:
            reference = reference + math.sqrt(1 - alpha) * torch.randn(y.shape, generator=seeded(t)).double()
        worst = max(worst, (stepped.double() - reference).abs().max().item())
        y = reference
    assert y.abs().max() < 10 and worst < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_and_prediction_are_inverse(kind, seeded):
    y0, eps = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1, torch.randn(4, 3, 8, 8, generator=seeded(1))
    gamma = torch.tensor([0.999, 0.5, 0.05, 0.01])
    y = diffuse(y0, eps, gamma)
    target = training_target(y0, eps, gamma, kind)
    torch.testing.assert_close(predicted_original(target, y, gamma, kind), y0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["paper", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000, 2000])
def test_any_number_of_steps(spacing, steps, seeded):
    """A perfect network's sample is the image itself, whatever the steps."""
    scheduler = PaletteScheduler(
        prediction_type="v_prediction", sampling_spacing=spacing, sampling_variance="fixed_small"
    )
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    gammas = scheduler.gamma(scheduler.timesteps)
    assert (gammas.diff() > 0).all()
    y0 = torch.rand(1, 3, 4, 4, generator=seeded()) * 2 - 1
    y = torch.randn(1, 3, 4, 4, generator=seeded(1))
    for t in scheduler.timesteps:
        gamma = scheduler.gamma(t)
        eps = (y - gamma.sqrt() * y0) / (1 - gamma).sqrt()
        out = scheduler.step(training_target(y0, eps, gamma, "v_prediction"), t, y, generator=seeded(2))
        y = out.prev_sample
        assert torch.isfinite(y).all() and out.pred_original_sample.abs().max() <= 1
    torch.testing.assert_close(y, y0, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_stepped_in_float32(dtype, seeded):
    scheduler = PaletteScheduler()
    scheduler.set_timesteps(1000)
    y, f = torch.randn(1, 3, 4, 4, generator=seeded()), torch.randn(1, 3, 4, 4, generator=seeded(1))
    half = scheduler.step(f.to(dtype), 999, y, generator=seeded(2)).prev_sample
    full = scheduler.step(f.to(dtype).float(), 999, y, generator=seeded(2)).prev_sample
    assert half.dtype == torch.float32 and torch.equal(half, full)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_other_solvers_drop_in(name, kind, seeded):
    """Right betas, and at every step the gamma that makes the model input's noise right: a perfect network
    (which needs the true gamma) is recovered only then."""
    scheduler = solver(name, prediction_type=kind)
    betas = torch.linspace(1e-6, 0.01, 2000, dtype=torch.float32)
    torch.testing.assert_close(scheduler.betas, betas)
    alphas = torch.cumprod(1 - betas.double(), 0)
    scheduler.set_timesteps(12)
    y0 = torch.rand(1, 3, 8, 8, generator=seeded()) * 1.8 - 0.9
    eps = torch.randn(1, 3, 8, 8, generator=seeded(1))
    y = eps * scheduler.init_noise_sigma
    gammas = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(y, t)
        gamma = noise_level(scheduler, t)
        gammas.append(gamma.item())
        # closed form: interpolate log gamma over the training schedule
        t_ = float(t)
        low = int(t_)
        log = (1 - (t_ - low)) * alphas[low].log() + (t_ - low) * alphas[min(low + 1, 1999)].log()
        if name != "HeunDiscreteScheduler":  # Heun's second evaluation is told the next timestep
            assert gamma.item() == pytest.approx(log.exp().item(), rel=0.05)
        noise = (scaled - gamma.sqrt() * y0) / (1 - gamma).sqrt()
        output = training_target(y0, noise, gamma, kind)
        step = {"generator": seeded(3)} if name.endswith("sde") else {}
        y = scheduler.step(output, t, y, **step).prev_sample
    assert gammas[0] == pytest.approx(4.4e-5, rel=0.02)
    torch.testing.assert_close(y, y0, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_clipping_survives_the_swap(name, seeded):
    scheduler = solver(name)
    scheduler.set_timesteps(5)
    y = torch.randn(1, 3, 8, 8, generator=seeded())
    for t in scheduler.timesteps:
        y = scheduler.step(torch.zeros_like(y), t, scheduler.scale_model_input(y, t)).prev_sample
    assert y.abs().max() < 1.5  # unclipped, x0 = y / sqrt(4e-5) would be 150 times the noise


def test_configuration_round_trip(tmp_path):
    PaletteScheduler(prediction_type="v_prediction", sampling_spacing="logsnr").save_pretrained(tmp_path)
    loaded = PaletteScheduler.from_pretrained(tmp_path)
    assert loaded.config.prediction_type == "v_prediction" and loaded.config.sampling_spacing == "logsnr"


@pytest.mark.parametrize(
    "options",
    [{"prediction_type": "noise"}, {"sampling_spacing": "karras"}, {"sampling_variance": "x"}, {"beta_schedule": "c"}],
)
def test_unknown_names_are_refused(options):
    with pytest.raises(ValueError, match="expected one of"):
        PaletteScheduler(**options)


@pytest.mark.parametrize("steps", [0, -1, 2.5, math.inf, math.nan, "4", None])
def test_bad_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps!r}, expected a whole number of at least 1"):
        PaletteScheduler().set_timesteps(steps)


WRONG = [
    *[{name: value} for name in ("num_train_timesteps", "sampling_timesteps") for value in (0, 2.5, "8", None)],
    *[{name: value} for name in ("beta_start", "sampling_beta_end") for value in (0.0, 1.5, math.nan, "0.1")],
    *[{name: value} for name in ("initial_noise", "restart_noise", "border_noise") for value in (-1, math.nan, "1")],
    *[{name: math.inf} for name in ("initial_noise", "restart_noise", "border_noise", "logsnr_max", "chroma_contrast")],
    *[{name: math.nan} for name in ("logsnr_min", "slow_noise", "source_eta", "chroma_guidance", "clip_sample_range")],
    *[{"task_noise": value} for value in (0.9, {"a": "1"}, {"a": -1}, {"a": math.nan}, {1: 1.0})],
    *[{"task_logsnr_min": value} for value in (-9.0, {"a": "1"}, {"a": math.inf}, {"a": 9.0}, {1: -9.0})],
    {"initial_noise": None}, {"clip_sample_range": 0.0}, {"sampling_order": 3},
    {"beta_start": 0.02}, {"sampling_beta_end": 1e-5}, {"logsnr_min": 5.0, "logsnr_max": 5.0},
    {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, {"num_train_timesteps": 2, "trained_betas": [0.1, 1.1]},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_impossible_numbers_are_refused_and_change_nothing(settings):
    name = list(settings)[-1] if "trained_betas" in settings else next(iter(settings))
    name = "sampling_beta_start" if settings == {"sampling_beta_end": 1e-5} else name
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*, expected "):
        PaletteScheduler(**settings)
    scheduler = PaletteScheduler()
    before = dict(scheduler.config)
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*, expected "):
        scheduler.register_to_config(**settings)
    assert dict(scheduler.config) == before


def test_settings_that_are_registered_hold():
    """Here and in a solver that is built from them, though they were defaults before."""
    scheduler = PaletteScheduler()
    scheduler.register_to_config(initial_noise=0.5, slow_noise=0.25, num_train_timesteps=1000, beta_end=0.02)
    assert scheduler.init_noise_sigma == 0.5 and len(scheduler) == len(scheduler.timesteps) == 1000
    for kind in (diffusers.DDIMScheduler, PaletteScheduler):
        other = kind.from_config(scheduler.config)
        assert (other.config["slow_noise"], other.config["initial_noise"]) == (0.25, 0.5)
        assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod) and len(other.betas) == 1000
    torch.testing.assert_close(scheduler.gamma(999), scheduler.alphas_cumprod[-1])
    scheduler.set_timesteps(3)
    scheduler.register_to_config(num_train_timesteps=500)
    assert len(scheduler.timesteps) == 3 and len(scheduler.betas) == 500


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_output_for_a_picture_is_read_back_as_that_picture(kind, seeded):
    y0, y = torch.randn(2, 4, 3, 8, 8, generator=seeded()).unbind()
    gamma = torch.tensor([0.9, 0.5, 0.05, 0.01])
    output = output_for(y0, y, gamma, kind)
    torch.testing.assert_close(predicted_original(output, y, gamma, kind), y0, atol=1e-4, rtol=1e-4)


def test_condition_velocity_is_the_best_linear_guess(seeded):
    """Against least squares on samples: y0 from the noisy image and a source with an error of 0.3."""
    y0 = torch.randn(1, 1, 400, 400, generator=seeded(1)) * 4  # wide, so that no prior helps
    x = y0 + 0.3 * torch.randn(y0.shape, generator=seeded(2))
    for gamma in (0.99, 0.9, 0.5, 0.05):
        y = diffuse(y0, torch.randn(y0.shape, generator=seeded(3)), gamma)
        guess = predicted_original(condition_velocity(y, x, gamma, 0.3), y, gamma, "v_prediction")
        best = torch.linalg.lstsq(torch.stack([y.flatten(), x.flatten()], 1), y0.flatten()[:, None]).solution
        linear = best[0] * y + best[1] * x
        error = [(z - y0).square().mean().item() for z in (guess, linear)]
        assert error[0] < error[1] * 1.01
    for gamma in (1e-9, 1 - 2**-24):  # bounded at both ends
        assert condition_velocity(y, x, gamma, 0.2).abs().max() < 50


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_variance_is_ddim(kind, seeded):
    """Step by step against the library's DDIM, at the levels of its own schedule."""
    ours = PaletteScheduler(prediction_type=kind, sampling_variance="zero", initial_noise=0.5)
    assert ours.init_noise_sigma == 0.5
    library = diffusers.DDIMScheduler.from_config(ours.config)
    library.set_timesteps(10)
    levels = [library.alphas_cumprod[t].item() for t in library.timesteps.flip(0)]
    ours.set_timesteps(10)
    ours._gammas = np.asarray([1.0, *levels])  # the same levels
    a = b = torch.randn(1, 3, 8, 8, generator=seeded())
    for i, t in enumerate(library.timesteps[:-1]):
        output = torch.randn(a.shape, generator=seeded(i)) * 0.1
        a = ours.step(output, 9 - i, a).prev_sample
        b = library.step(output, t, b, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_betas_that_are_given(tmp_path):
    """Another schedule than the linear one, here and in a solver built from the configuration."""
    betas = [0.1, 0.3, 0.2]
    scheduler = PaletteScheduler(num_train_timesteps=3, trained_betas=betas)
    np.testing.assert_allclose(scheduler.gamma(torch.tensor([0, 1, 2])), [0.9, 0.63, 0.504], rtol=1e-6)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(PaletteScheduler.from_pretrained(tmp_path).betas, torch.tensor(betas))
    assert torch.equal(diffusers.DDIMScheduler.from_config(scheduler.config).alphas_cumprod, scheduler.alphas_cumprod)


def test_gammas_are_uniform_in_each_of_three_pieces(seeded):
    """By the seed alone; every step of the schedule has its share, the first and the last, too."""
    scheduler = PaletteScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.3, 0.2])
    gamma = scheduler.sample_gamma(30_000, seeded(5))
    assert torch.equal(gamma, scheduler.sample_gamma(30_000, seeded(5)))
    assert not torch.equal(gamma, scheduler.sample_gamma(30_000, seeded(6)))
    assert gamma.dtype == torch.float32 and 0.504 <= gamma.min() < 0.506 and 0.999 < gamma.max() < 1
    for low, high in ((0.504, 0.63), (0.63, 0.9), (0.9, 1.0)):
        inside = gamma[(gamma > low) & (gamma < high)]
        assert len(inside) / 30_000 == pytest.approx(1 / 3, abs=0.01)
        assert inside.mean().item() == pytest.approx((low + high) / 2, abs=0.003)


def test_the_level_of_our_own_schedule_and_of_a_copy_of_it():
    scheduler = PaletteScheduler()
    scheduler.set_timesteps(7)
    for t in range(7):
        assert noise_level(scheduler, t) == scheduler.gamma(t) and noise_level(scheduler, t).dtype == torch.float32
    assert len({noise_level(scheduler, t).item() for t in range(7)}) == 7


IN_SIGMAS = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
)  # fmt: skip
IN_ALPHAS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
    "LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler",
)  # fmt: skip


def built(name, *changes, **settings):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    return build(getattr(diffusers, name), PaletteScheduler(**settings).config, **dict(changes))


@pytest.mark.parametrize("name", IN_SIGMAS + IN_ALPHAS)
def test_the_level_told_is_that_of_the_scaled_input(name):
    """Second evaluations of KDPM2 lie between two sigmas."""
    scheduler = built(name, num_train_timesteps=200)
    scheduler.set_timesteps(5)
    y = torch.ones(1, 3, 2, 2)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(y, t)
        if name in IN_SIGMAS:
            assert noise_level(scheduler, t).item() == pytest.approx(scaled.square().mean().item(), rel=1e-6)
            assert noise_level(scheduler, t).dtype == torch.float32
        else:
            assert scaled is y
        scheduler.step(torch.zeros_like(y), t, y)


@pytest.mark.parametrize("name", IN_SIGMAS + IN_ALPHAS)
def test_what_a_solver_carries_does_not_depend_on_its_noise(name):
    """In mild schedules, and in a single step near the picture, Euler's first sigma is below 1."""
    for changes in ((), [("timestep_spacing", "leading")]):
        scheduler = built(name, *changes, num_train_timesteps=50, beta_start=1e-4, beta_end=0.02)
        scheduler.set_timesteps(1)
        assert float(scheduler.init_noise_sigma) < 1.5 and len(scheduler.timesteps) == 1
        assert variance_exploding(scheduler) == (name in IN_SIGMAS)
        assert len(scheduler.timesteps) == 1
    assert not variance_exploding(PaletteScheduler(initial_noise=2.0))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_the_level_is_that_of_the_step_which_comes(name):
    """Heun takes most timesteps twice: the solver's own count says which of the two it is."""
    scheduler = solver(name)
    scheduler.set_timesteps(4)
    y = torch.ones(1, 3, 2, 2) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        assert noise_level(scheduler, t) == 1 / (1 + scheduler.sigmas[i] ** 2)
        y = scheduler.step(torch.zeros_like(y), t, y).prev_sample
    assert i == len(scheduler.timesteps) - 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "zero"])
def test_a_step_by_the_papers_formulas(kind, variance, seeded):
    """Mean and variance of each kind, in float64; the last step adds no noise, and the dtype is the sample's."""
    scheduler = PaletteScheduler(
        prediction_type=kind, sampling_variance=variance, clip_sample_range=0.5, sampling_beta_end=0.004
    )
    scheduler.set_timesteps(5)
    table = np.log(linear_gammas(1e-4, 0.004, 1000))
    gammas = np.exp(np.interp(np.arange(6) * 200, np.arange(1001), table))
    y, output = torch.randn(2, 1, 3, 4, 4, generator=seeded()).double().unbind()
    for t in range(5):
        gamma, before = gammas[t + 1], gammas[t]
        alpha = gamma / before
        y0 = {"epsilon": (y - math.sqrt(1 - gamma) * output) / math.sqrt(gamma), "sample": output,
            "v_prediction": math.sqrt(gamma) * y - math.sqrt(1 - gamma) * output}[kind].clamp(-0.5, 0.5)  # fmt: skip
        eps = (y - math.sqrt(gamma) * y0) / math.sqrt(1 - gamma)
        mean = (math.sqrt(before) * (1 - alpha) * y0 + math.sqrt(alpha) * (1 - before) * y) / (1 - gamma)
        small = (1 - alpha) * (1 - before) / (1 - gamma)
        deviation = {"fixed_large": 1 - alpha, "fixed_small": small, "zero": 0}[variance]
        if variance == "zero":
            mean = math.sqrt(before) * y0 + math.sqrt(1 - before) * eps
        noise = torch.randn(y.shape, generator=seeded(t)).double() if t else 0
        out = scheduler.step(output.float(), torch.tensor(t), y.float(), generator=seeded(t))
        torch.testing.assert_close(out.prev_sample.double(), mean + math.sqrt(deviation) * noise, atol=2e-5, rtol=0)
        torch.testing.assert_close(out.pred_original_sample.double(), y0, atol=2e-5, rtol=1e-5)
        pair = scheduler.step(output.half(), t, y.half(), generator=seeded(t), return_dict=False)
        assert isinstance(pair, tuple) and pair[0].dtype == pair[1].dtype == torch.float16
    for t in (-1, 5):
        with pytest.raises(ValueError, match=f"timestep is {t}, expected 0 to 4: call set_timesteps first"):
            scheduler.step(output, t, y)


def test_spacings_are_what_they_say():
    scheduler = PaletteScheduler(sampling_spacing="logsnr", logsnr_min=-4, logsnr_max=6)
    for steps, expected in ((1, [-4]), (2, [6, -4]), (6, [6, 4, 2, 0, -2, -4])):
        scheduler.set_timesteps(steps)
        gamma = scheduler.gamma(torch.arange(steps)).double()
        torch.testing.assert_close(torch.logit(gamma), torch.tensor(expected).double(), atol=1e-4, rtol=0)
        assert scheduler.timesteps.tolist() == list(range(steps))[::-1] and scheduler.num_inference_steps == steps
    paper = PaletteScheduler()
    paper.set_timesteps(500)  # every second level
    table = linear_gammas(1e-4, 0.09, 1000)
    np.testing.assert_allclose(paper.gamma(torch.arange(500)).numpy(), table[2::2], rtol=1e-5)
    assert paper.gamma(3).shape == () and paper.gamma(torch.tensor([[1, 2]])).shape == (1, 2)
    paper.set_timesteps(4.0)
    assert len(paper.timesteps) == 4 and len(paper) == 2000


def test_noise_and_velocity_of_a_training_step(seeded):
    scheduler = PaletteScheduler()
    y0, eps = torch.randn(2, 3, 3, 4, 4, generator=seeded()).half().unbind()
    t = torch.tensor([0, 700, 1999])
    gamma = torch.from_numpy(scheduler.training_gammas)[t + 1].reshape(-1, 1, 1, 1)
    noisy, velocity = scheduler.add_noise(y0, eps, t), scheduler.get_velocity(y0, eps, t)
    assert noisy.dtype == velocity.dtype == torch.float16
    torch.testing.assert_close(noisy.double(), gamma.sqrt() * y0 + (1 - gamma).sqrt() * eps, atol=2e-3, rtol=0)
    torch.testing.assert_close(velocity.double(), gamma.sqrt() * eps - (1 - gamma).sqrt() * y0, atol=2e-3, rtol=0)
    for formula in (training_target, predicted_original):
        with pytest.raises(ValueError, match="is 'noise', expected one of epsilon, v_prediction, sample"):
            formula(y0, eps, 0.5, "noise")


def test_timesteps_are_found_by_their_level():
    """Of another schedule than the doctest's: whole ones exactly, and those between in log-SNR."""
    gammas = torch.from_numpy(linear_gammas(1e-3, 0.05, 200)).float()
    t = torch.tensor([0, 1, 17, 100, 198, 199])
    assert torch.equal(timestep_of(gammas[t + 1], 1e-3, 0.05, 200), t.float())
    between = torch.sigmoid(torch.lerp(torch.logit(gammas[101]), torch.logit(gammas[102]), 0.25))
    found = timestep_of(between[None], 1e-3, 0.05, 200)
    assert found.shape == (1,) and found.item() == pytest.approx(100.25, abs=1e-3)
    assert timestep_of(torch.tensor([1 - 2**-20, 1e-9]), 1e-3, 0.05, 200).tolist() == [0, 199]


def waves(size, cycles_down, cycles_across):
    down, across = (2 * torch.pi * torch.arange(n) / n for n in size)
    return (cycles_down * down[:, None] + cycles_across * across).cos()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (63, 41)])
@pytest.mark.parametrize("cycles", [1, 2])
def test_calm_noise_has_less_of_its_slow_waves_and_all_of_the_others(size, cycles, seeded):
    noise = torch.randn(2, 3, *size, generator=seeded())
    calmed = calm(noise, 0.25, cycles)
    for down, across in ((0, 0), (cycles, 0), (cycles, -1), (0, cycles), (-cycles, cycles)):
        slow = waves(size, down, across)
        assert torch.allclose(calm(noise + slow, 0.25, cycles), calmed + 0.25 * slow, atol=1e-5)
    for down, across in ((cycles + 1, 0), (0, cycles + 1), (-1, cycles + 1)):
        other = waves(size, down, across)
        assert torch.allclose(calm(noise + other, 0.25, cycles), calmed + other, atol=1e-5)
    assert torch.allclose(calm(noise, 1, cycles), noise)


def first_samples(pipe, task, mask=None, **settings):
    """What a sampling from noise starts from, by the network's eyes, with and without the slow waves."""
    seen = []

    def predict(sample, gamma, condition):
        seen.append(sample.clone())
        return pipe._predict(sample, gamma, condition)

    task = get_task(task)
    given = task.prepare(torch.zeros(1, 3, 32, 32), mask, [torch.Generator()])
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for slow_noise in (1, 0):
        scheduler = PaletteScheduler(slow_noise=slow_noise, sampling_spacing="logsnr", sampling_variance="zero")
        pipe.scheduler = scheduler
        pipe.denoise(given, latents=noise, num_inference_steps=2, task=task, predict=predict, **settings)
    return noise, seen[0], seen[-2]


def test_slow_noise_is_of_chroma_where_luma_is_given_of_all_in_holes_and_not_of_tiles(pipe):
    noise, whole, calmed = first_samples(pipe, "colorization")
    assert torch.equal(whole, noise)
    assert torch.allclose(luma(calmed), luma(noise), atol=1e-5)
    assert torch.allclose(chroma(calmed), calm(chroma(noise), 0, 1), atol=1e-5)
    noise, whole, calmed = first_samples(pipe, "inpainting", mask=torch.ones(1, 1, 32, 32).tril())
    assert torch.equal(whole, noise) and torch.allclose(calmed, calm(noise, 0, 2), atol=1e-5)
    noise, whole, calmed = first_samples(pipe, "jpeg_restoration", strength=1)
    assert torch.equal(whole, noise) and torch.equal(calmed, noise)


def test_slow_noise_is_a_share():
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"slow_noise is {wrong}, expected 0 \(none\) to 1"):
            PaletteScheduler(slow_noise=wrong)


REFUSED = {
    **dict.fromkeys(UNFIT, "wrong"),
    **dict.fromkeys(("CMStochasticIterativeScheduler", "IPNDMScheduler", "SCMScheduler"), "no alphas_cumprod"),
    **dict.fromkeys(("DDPMWuerstchenScheduler", "KarrasVeScheduler"), "no alphas_cumprod, timesteps"),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "from the picture to noise"),
    "RePaintScheduler": "need mask, original_image",
    "CogVideoXDPMScheduler": "need old_pred_original_sample, timestep_back",
    "HeliosScheduler": "no alphas_cumprod",
}


@pytest.mark.parametrize("name", REFUSED)
def test_solvers_that_would_make_wrong_pictures_are_refused(name, pipe, photo):
    """PNDM and LMS made noise of what begins midway; EDM washed it out."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip("not in this version of diffusers")
    pipe.scheduler = kind.from_config(pipe.scheduler.config) if "FlowMatch" not in name else kind()
    with pytest.raises(ValueError, match=f"{name} doesn't fit .*{REFUSED[name]}.* expected PaletteScheduler"):
        pipe(photo, num_inference_steps=2)
    assert name not in PaletteScheduler._compatibles


@pytest.mark.parametrize("name", IN_SIGMAS + IN_ALPHAS)
def test_solvers_that_fit_are_taken_for_what_they_know(name):
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = built(name, prediction_type=kind, num_train_timesteps=50)
        if kind == "sample" and name in WITHOUT_SAMPLE:
            with pytest.raises(ValueError, match=f"{name} doesn't fit .*not with prediction_type 'sample'"):
                check_solver(scheduler)
        else:
            check_solver(scheduler)
    assert set(PaletteScheduler._compatibles) <= {*IN_SIGMAS, *IN_ALPHAS}
    if "use_flow_sigmas" in scheduler.config:
        with pytest.raises(ValueError, match="use_flow_sigmas is on"):
            check_solver(built(name, ("use_flow_sigmas", True)))
