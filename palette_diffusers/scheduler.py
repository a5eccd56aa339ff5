"""All of gamma: the schedules, the levels used in training, adding noise, and the sampler's step.

Symbols are the paper's (Saharia et al. 2022): y0 is the clean image, y the noisy one, eps the noise, and
gamma in (0, 1] the share of the signal's variance, so that y = sqrt(gamma) y0 + sqrt(1 - gamma) eps.
Images are (B, C, H, W), RGB, [-1, 1]; gamma is a float32 tensor (B,).
"""

import copy
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("paper", "logsnr")
OWN_SETTINGS = {
    "sampling_timesteps", "sampling_beta_start", "sampling_beta_end", "sampling_spacing", "sampling_variance",
    "sampling_order",
    "logsnr_min", "logsnr_max", "task_logsnr_min", "initial_noise", "task_noise", "restart_noise", "border_noise",
    "source_eta", "chroma_guidance", "chroma_contrast", "slow_noise",
}  # fmt: skip
VARIANCES = ("fixed_large", "fixed_small", "zero")
TRAINING_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "trained_betas")


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is a finite number in this range."""
    return isinstance(value, numbers.Real) and math.isfinite(value) and least <= float(value) <= most


def _by_name(value: Any, least: float = -math.inf) -> bool:
    """Whether it is None, or finite numbers in this range by names."""
    if value is None:
        return True
    return isinstance(value, dict) and all(isinstance(k, str) and is_number(v, least) for k, v in value.items())


NUMERIC_SETTINGS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    # settings of `PaletteScheduler`, what is expected of them, and whether a value is that
    (
        ("num_train_timesteps", "sampling_timesteps"),
        "a whole number of at least 1",
        lambda x: isinstance(x, numbers.Integral) and is_number(x, 1),
    ),
    (
        ("beta_start", "beta_end", "sampling_beta_start", "sampling_beta_end"),
        "a number above 0, at most 1",
        lambda x: is_number(x) and 0 < x <= 1,
    ),
    (("sampling_order",), "1 or 2", lambda x: x in (1, 2)),
    (("logsnr_min", "logsnr_max"), "a finite number", is_number),
    (("clip_sample_range",), "a number above 0", lambda x: is_number(x) and x > 0),
    (("initial_noise",), "a number of at least 0", lambda x: is_number(x, 0)),
    (("restart_noise", "border_noise"), "a number of at least 0, or None", lambda x: x is None or is_number(x, 0)),
    (("task_noise",), "numbers of at least 0 by tasks' names, or None", lambda x: _by_name(x, 0)),
    (("task_logsnr_min",), "finite numbers by tasks' names, or None", _by_name),
    (("slow_noise",), "0 (none) to 1 (all)", lambda x: is_number(x, 0, 1)),
    (("source_eta",), "0 (no new noise) to 1 (ancestral)", lambda x: x is None or is_number(x, 0, 1)),
    (("chroma_guidance",), "0 (none) or above", lambda x: is_number(x, 0)),
    (("chroma_contrast",), "0 (one tint) or above", lambda x: is_number(x, 0)),
)


@dataclass
class PaletteSchedulerOutput(BaseOutput):
    """`prev_sample` and `pred_original_sample`, both (B, C, H, W)."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def linear_gammas(beta_start: float, beta_end: float, steps: int) -> np.ndarray:
    """gamma_0 = 1, gamma_1, ..., gamma_T of a linear beta schedule, in float64: (T + 1,)."""
    return np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(beta_start, beta_end, steps))])


def _like(gamma: torch.Tensor | float, image: torch.Tensor) -> torch.Tensor:
    """gamma (B,) or scalar => float32 (B, 1, 1, 1) on the image's device."""
    gamma = torch.as_tensor(gamma, dtype=torch.float32, device=image.device)
    return gamma.reshape(-1, *[1] * (image.ndim - 1))


def diffuse(y0: torch.Tensor, eps: torch.Tensor, gamma: torch.Tensor | float) -> torch.Tensor:
    """Equation 2 of the paper, in float32: y = sqrt(gamma) y0 + sqrt(1 - gamma) eps."""
    gamma = _like(gamma, y0)
    return gamma.sqrt() * y0.float() + (1 - gamma).sqrt() * eps.float()


def training_target(
    y0: torch.Tensor, eps: torch.Tensor, gamma: torch.Tensor | float, prediction_type: str
) -> torch.Tensor:
    """What the network is asked for: eps (the paper), y0 itself ("sample"), or the velocity
    v = sqrt(gamma) eps - sqrt(1 - gamma) y0 (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return y0
    if prediction_type == "v_prediction":
        gamma = _like(gamma, y0)
        return gamma.sqrt() * eps - (1 - gamma).sqrt() * y0
    raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def predicted_original(
    output: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor | float, prediction_type: str
) -> torch.Tensor:
    """The y0 that a network's output stands for, in float32; inverts `training_target`."""
    output, y, gamma = output.float(), y.float(), _like(gamma, y)
    if prediction_type == "epsilon":
        return (y - (1 - gamma).sqrt() * output) / gamma.sqrt()
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return gamma.sqrt() * y - (1 - gamma).sqrt() * output
    raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def output_for(y0: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor | float, prediction_type: str) -> torch.Tensor:
    """The output that stands for a given y0 at y, in float32; `predicted_original` takes it back."""
    y0, y, gamma = y0.float(), y.float(), _like(gamma, y)
    eps = (y - gamma.sqrt() * y0) / (1 - gamma).clamp_min(1e-12).sqrt()
    return training_target(y0, eps, gamma, prediction_type)


def condition_velocity(
    y: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor | float, error: torch.Tensor | float
) -> torch.Tensor:
    """The velocity of the best linear guess at y0 from y and from a source x that is y0 plus an error of this
    standard deviation (one number, or one for each pixel), in float32.

    y / sqrt(gamma) is y0 plus an error of variance (1 - gamma) / gamma; the two are weighted by their inverse
    variances. Bounded for every gamma. Source: Karras et al. 2022 (EDM), appendix B.6, with a second measurement.
    """
    y, x, gamma = y.float(), x.float(), _like(gamma, y)
    noise = 1 - gamma
    total = noise + error**2 * gamma
    y0 = (error**2 * gamma.sqrt() * y + noise * x) / total
    return (gamma.sqrt() * y - y0) / noise.clamp_min(1e-12).sqrt()


@cache
def _linear_logsnr(beta_start: float, beta_end: float, steps: int, device: torch.device) -> torch.Tensor:
    """log-SNR of every timestep of a linear schedule, falling: float32 (T,)."""
    gammas = linear_gammas(beta_start, beta_end, steps)[1:]
    return torch.from_numpy(np.log(gammas) - np.log1p(-gammas)).float().to(device)


def timestep_of(gamma: torch.Tensor, beta_start: float, beta_end: float, steps: int) -> torch.Tensor:
    """The timestep, 0 to T - 1, at which a linear beta schedule has this level: float32 (B,), fractional between two,
    whole where it is within 0.01 of one (float32 says gamma near 1 no better).

    >>> gammas = torch.from_numpy(linear_gammas(1e-4, 0.02, 1000)).float()
    >>> timestep_of(gammas[[1, 500, 1000]], 1e-4, 0.02, 1000)
    tensor([  0., 499., 999.])
    """
    table = _linear_logsnr(beta_start, beta_end, steps, gamma.device)
    logsnr = gamma.log() - torch.log1p(-gamma)
    after = torch.searchsorted(-table, -logsnr).clamp(1, steps - 1)
    high, low = table[after - 1], table[after]
    t = (after - 1 + (high - logsnr) / (high - low)).clamp(0, steps - 1)
    return torch.where((t - t.round()).abs() < 0.01, t.round(), t)


def calm(noise: torch.Tensor, kept: float, cycles: int) -> torch.Tensor:
    """Noise (B, C, H, W) => the same, its mean and its waves of at most so many cycles a side times `kept`.

    >>> noise = torch.randn(1, 3, 64, 64)
    >>> bool(calm(noise, 0.5, 1).mean((-2, -1)).allclose(noise.mean((-2, -1)) / 2, atol=1e-6))
    True
    """
    waves = torch.fft.rfft2(noise)
    slow = torch.zeros_like(waves)
    for rows in (slice(cycles + 1), slice(-cycles, None)):
        slow[..., rows, : cycles + 1] = waves[..., rows, : cycles + 1]
    return noise - (1 - kept) * torch.fft.irfft2(slow, s=noise.shape[-2:])


_exploding: dict[type, bool] = {}  # by class, as it takes a millisecond to find out


def variance_exploding(scheduler: Any) -> bool:
    """Whether a solver carries y / sqrt(gamma) instead of y, as Euler and Heun do: they scale what the network sees."""
    if hasattr(scheduler, "gamma"):
        return False
    kind = type(scheduler)
    if kind not in _exploding:
        probe = copy.deepcopy(scheduler)
        probe.set_timesteps(2)
        _exploding[kind] = bool(probe.scale_model_input(torch.ones(1), probe.timesteps[0]) != 1)
    return _exploding[kind]


# solvers of diffusers that give wrong pictures: the first two begin midway wrongly, others are for other networks
UNFIT = (
    "PNDMScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
)  # fmt: skip
# those that know no network that predicts y0
WITHOUT_SAMPLE = (
    "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)  # fmt: skip


def check_solver(scheduler: Any) -> None:
    """Raises:
    ValueError: a solver whose pictures would be wrong (`UNFIT`, or one from the picture to noise), that has no levels
        or steps as the sampling loop takes them, or that doesn't know what the network predicts.
    """
    if callable(getattr(scheduler, "gamma", None)):
        return
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
    needed = ("alphas_cumprod", "init_noise_sigma", "timesteps", "step")
    missing = [attribute for attribute in needed if getattr(scheduler, attribute, None) is None]
    if name in UNFIT:
        reason = "its pictures would be wrong"
    elif missing:
        reason = f"it has no {', '.join(missing)}"
    elif more := _required(scheduler.step) - {"model_output", "timestep", "sample"}:
        reason = f"its steps need {', '.join(sorted(more))}"
    elif scheduler.timesteps[0] < scheduler.timesteps[-1]:
        reason = "it goes from the picture to noise"
    elif scheduler.config.get("use_flow_sigmas"):
        reason = "use_flow_sigmas is on"
    elif kind not in PREDICTION_TYPES or (kind == "sample" and name in WITHOUT_SAMPLE):
        reason = f"not with prediction_type {kind!r}"
    else:
        return
    raise ValueError(
        f"{name} doesn't fit these networks ({reason}), expected PaletteScheduler, UniPCMultistepScheduler, "
        "DPMSolverMultistepScheduler, DDIMScheduler, EulerDiscreteScheduler or another one in sigmas or alphas"
    )


def _required(function: Callable[..., Any]) -> set[str]:
    """The names of the arguments that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind in named and p.default is p.empty}


def noise_level(scheduler: Any, timestep: torch.Tensor | float) -> torch.Tensor:
    """gamma at a timestep of any diffusers scheduler: a float32 scalar tensor.

    Solvers with integer timesteps (DDIM, DPM-Solver, UniPC) index `alphas_cumprod`; those in sigmas (Euler,
    Heun) have gamma = 1 / (1 + sigma^2), where KDPM2's second evaluations lie between two of its sigmas.
    """
    if hasattr(scheduler, "gamma"):  # not by class: a published repository carries its own copy
        return scheduler.gamma(timestep)
    if variance_exploding(scheduler):
        index = scheduler.step_index
        if index is None:
            index = scheduler.index_for_timestep(timestep)
        elif _between(scheduler):
            # each class keeps that sigma elsewhere
            one = torch.ones((), dtype=torch.float64)
            return scheduler.scale_model_input(one, timestep).square().float().cpu()
        return 1 / (1 + scheduler.sigmas[index].float().cpu() ** 2)
    index = int(round(float(timestep)))
    return scheduler.alphas_cumprod[index].float().cpu()


def _between(scheduler: Any) -> bool:
    """Whether the evaluation that comes is at a level between two sigmas."""
    has_such = hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma")
    return has_such and not scheduler.state_in_first_order


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: one of `PaletteScheduler`'s settings is an unknown name or no such number, or two contradict.
    """
    for name, known in (
        ("beta_schedule", ("linear",)),
        ("prediction_type", PREDICTION_TYPES),
        ("sampling_spacing", SPACINGS),
        ("sampling_variance", VARIANCES),
    ):
        if name in settings and settings[name] not in known:
            raise ValueError(f"{name} is {settings[name]!r}, expected one of {', '.join(known)}")
    for names, expected, fits in NUMERIC_SETTINGS:
        for name in settings.keys() & set(names):  # a class of its own may not have all
            if not fits(settings[name]):
                raise ValueError(f"{name} is {settings[name]!r}, expected {expected}")
    for low, high in (("beta_start", "beta_end"), ("sampling_beta_start", "sampling_beta_end")):
        if low in settings and high in settings and settings[low] > settings[high]:
            raise ValueError(f"{low} is {settings[low]}, expected at most {high}, {settings[high]}")
    high, own = settings.get("logsnr_max", math.inf), settings.get("task_logsnr_min") or {}
    if settings.get("logsnr_min", -math.inf) >= high:
        raise ValueError(f"logsnr_min is {settings['logsnr_min']}, expected below logsnr_max, {high}")
    for task, low in own.items():
        if low >= high:
            raise ValueError(f"task_logsnr_min is {low} for {task}, expected below logsnr_max, {high}")
    betas, steps = settings.get("trained_betas"), settings.get("num_train_timesteps")
    if betas is not None:
        if len(betas) != steps:
            raise ValueError(f"trained_betas has {len(betas)} numbers, expected num_train_timesteps, {steps}")
        for beta in betas:
            if not is_number(beta, 0, 1):
                raise ValueError(f"trained_betas has {beta!r}, expected numbers from 0 to 1")


class PaletteScheduler(SchedulerMixin, ConfigMixin):
    """The paper's diffusion: alpha-conditioned training and ancestral sampling (its Algorithms 1 and 2).

    The training schedule is named as every diffusers scheduler names it (`beta_start`, `beta_end`,
    `num_train_timesteps`), so that another solver built by `from_config` integrates over the levels that the
    network was trained on. The sampling schedule is the paper's own, and differs.

    A timestep is an index into the sampling schedule, from `num_inference_steps - 1` down to 0;
    `gamma(timestep)` is its level. Before `set_timesteps` it indexes the training schedule.

    Args:
        num_train_timesteps, beta_start, beta_end: the training schedule; 2000, 1e-6, 0.01 in the paper.
        trained_betas: all betas of the training schedule, where it isn't linear.
        sampling_timesteps, sampling_beta_start, sampling_beta_end: 1000, 1e-4, 0.09 in the paper.
        prediction_type: "epsilon" (the paper), "v_prediction" or "sample".
        clip_sample: clamp the predicted y0 to [-clip_sample_range, clip_sample_range] at every step.
        sampling_spacing: "paper" follows the sampling schedule, in any number of steps; "logsnr" places the
            steps evenly in log-SNR between `logsnr_min` and `logsnr_max`, inside the trained range (few steps).
        task_logsnr_min: another `logsnr_min` for tasks that are named here, as in {"inpainting": -12.0}; other solvers,
            which have levels of their own, know no such.
        sampling_variance: "fixed_large", 1 - alpha_t, is the paper's; "fixed_small", the posterior variance,
            leaves no residual noise when steps are few; "zero" is deterministic (DDIM, Song et al. 2021).
        sampling_order: 2 takes the step before into account (DPM-Solver++ 2M, or SDE-DPM-Solver++ 2M where steps bring
            new noise; Lu et al. 2022), 1 does not; "fixed_large" has 1.
        initial_noise: factor on the noise that sampling starts from. Below 1, samples are calmer and less diverse;
            0 for a regression, which starts from none.
        slow_noise: the share that is kept of the first noise's slow waves (`calm`), which large shapes and tints
            follow, though they know nothing of the picture: of chroma up to one cycle a side in tasks that are given
            the luma, of all up to two elsewhere, but not in tiles. Below 1, samples are rather what the network takes
            for likely.
        task_noise: another `initial_noise` for tasks that are named here, as in {"colorization": 1.0}; the pipeline
            takes it for other solvers, too.
        restart_noise: as `initial_noise`, where sampling starts from a coarser picture, or from a source above the
            network's own size, so that it brings no grain of its own; None is `initial_noise`.
        border_noise: as `initial_noise`, where a new border (uncropping) is made for a photograph above the network's
            size: what the noise puts at its far side is enlarged there; None is `initial_noise`.
        source_eta: `eta` (see `step`) of tasks that start from their source (JPEG restoration), where
            `sampling_variance` is "zero": above 0, the sample gets detail that a deterministic path leaves out, and a
            lower PSNR; None is 0.
        chroma_guidance: for tasks that are given the luma: a factor on the predicted chroma while log-SNR is at most 1
            (2 where a photograph was made smaller), where it is also evened out within regions of like luma
            (`color.even_chroma`), so that no sky changes its tint midway; 0 leaves it as it is (the paper), whatever
            `chroma_contrast` says.
        chroma_contrast: a further factor, while log-SNR is at most 1, on what chroma differs from its mean over the
            picture: above 1, parts of a picture differ more in colour, and all of it has no more of one tint. It is
            that of 4 steps at these levels; of n steps, each has it to the power of (4 / n)^0.3. Photographs above the
            network's size get 0.85 of what is above 1.
        timestep_spacing, thresholding, dynamic_thresholding_ratio, sample_max_value: not used here, but by a
            solver built from this configuration: steps from the noisiest level on, and y0 clamped to [-1, 1].

    Raises:
        ValueError: an unknown name or an impossible number among the above.

    Source: Saharia et al. 2022, section 3 and appendix; SR3 (Saharia et al. 2021) for the piecewise levels.

    >>> scheduler = PaletteScheduler()
    >>> scheduler.set_timesteps(1000)
    >>> f"{scheduler.gamma(scheduler.timesteps[0]).item():.1e}"
    '6.6e-21'
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name not in UNFIT]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        beta_start: float = 1e-6,
        beta_end: float = 0.01,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        sampling_timesteps: int = 1000,
        sampling_beta_start: float = 1e-4,
        sampling_beta_end: float = 0.09,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        sampling_spacing: str = "paper",
        sampling_variance: str = "fixed_large",
        sampling_order: int = 1,
        logsnr_min: float = -9.0,
        logsnr_max: float = 9.0,
        task_logsnr_min: dict[str, float] | None = None,
        initial_noise: float = 1.0,
        slow_noise: float = 1.0,
        task_noise: dict[str, float] | None = None,
        restart_noise: float | None = None,
        border_noise: float | None = None,
        source_eta: float | None = None,
        chroma_guidance: float = 0.0,
        chroma_contrast: float = 1.0,
        timestep_spacing: str = "trailing",
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 1.0,
        sample_max_value: float = 1.0,
    ):
        # the library drops defaulted values when another class is built from a configuration, and that solver
        # would then get the library's own betas in silence: only what no solver of it knows counts as defaulted
        defaulted = self.config.get("_use_default_values")
        if defaulted is not None:
            self.register_to_config(_use_default_values=sorted(set(defaulted) & OWN_SETTINGS))
        self.num_inference_steps: int | None = None
        self._before: tuple[int, torch.Tensor] | None = None  # the last step, and the y0 that it predicted
        self._set_training_schedule()

    def _set_training_schedule(self) -> None:
        config = self.config
        steps = config.num_train_timesteps
        # as the library's solvers do it, in float32, so that a swapped solver agrees to the bit
        if config.trained_betas is None:
            self.betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float32)
            self.training_gammas = linear_gammas(config.beta_start, config.beta_end, steps)
        else:
            betas = np.asarray(config.trained_betas, np.float64)
            self.betas = torch.from_numpy(betas).float()
            self.training_gammas = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        if self.num_inference_steps is None:
            self._gammas = self.training_gammas
            self.timesteps = torch.arange(steps - 1, -1, -1)

    @property
    def init_noise_sigma(self) -> float:
        """Factor on the noise that sampling starts from: `initial_noise`."""
        return self.config.initial_noise

    def register_to_config(self, **settings: Any) -> None:
        """As usual: changes settings, those of sampling from the next `set_timesteps` on. A solver that is built from
        the configuration has them, too.

        Raises:
            ValueError: an unknown name or an impossible number; nothing has changed then.
        """
        merged = {**self.__dict__.get("_internal_dict", {}), **settings}
        _check_settings(merged)
        if "_use_default_values" in merged and "_use_default_values" not in settings:
            defaulted = [name for name in merged["_use_default_values"] if name not in settings]
            settings["_use_default_values"] = defaulted
        super().register_to_config(**settings)
        if hasattr(self, "betas") and not settings.keys().isdisjoint(TRAINING_SCHEDULE):
            self._set_training_schedule()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # training

    def sample_gamma(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """t ~ U{1..T}, gamma ~ U(gamma_{t-1}, gamma_t) (SR3's form of the paper's p(gamma)): float32 (B,)."""
        t = torch.randint(1, len(self.training_gammas), (batch_size,), generator=generator)
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        gammas = torch.from_numpy(self.training_gammas)
        # float32 would round the least noisy levels to 1, whose log-SNR is infinite
        return torch.lerp(gammas[t], gammas[t - 1], u).float().clamp(max=1 - 2**-24)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`diffuse` at timesteps (B,) of the current schedule, in the dtype of the samples."""
        return diffuse(original_samples, noise, self.gamma(timesteps)).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The v target at timesteps (B,), in the dtype of the samples."""
        return training_target(sample, noise, self.gamma(timesteps), "v_prediction").to(sample.dtype)

    # sampling

    def lowest(self, task: str | None = None) -> float:
        """The log-SNR that steps begin at ("logsnr" spacing): a task's own, or `logsnr_min`."""
        own = self.config.task_logsnr_min or {}
        return float(own.get(task, self.config.logsnr_min))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, task: str | None = None
    ) -> None:
        """Any number of steps >= 1. In "paper" spacing, 1000 steps are the paper's exactly; fewer or more
        interpolate log gamma over the same schedule. `task` is the name of one that may have its own
        (`task_logsnr_min`).

        >>> scheduler = PaletteScheduler(sampling_spacing="logsnr")
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps
        tensor([2, 1, 0])
        """
        if isinstance(num_inference_steps, torch.Tensor):
            num_inference_steps = num_inference_steps.item()
        if not is_number(num_inference_steps, 1) or int(num_inference_steps) != num_inference_steps:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}, expected a whole number of at least 1")
        steps, config = int(num_inference_steps), self.config
        if config.sampling_spacing == "paper":
            table = linear_gammas(config.sampling_beta_start, config.sampling_beta_end, config.sampling_timesteps)
            position = np.arange(steps + 1) * config.sampling_timesteps / steps
            gammas = np.exp(np.interp(position, np.arange(len(table)), np.log(table)))
        else:
            low = self.lowest(task)
            logsnr = np.linspace(config.logsnr_max, low, steps) if steps > 1 else [low]
            gammas = np.concatenate([[1.0], 1 / (1 + np.exp(-np.asarray(logsnr)))])
        self._gammas, self._before = gammas, None
        self.num_inference_steps = steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)

    def gamma(self, timestep: torch.Tensor | int | float) -> torch.Tensor:
        """The level at a timestep, a float32 tensor of the timestep's shape."""
        index = torch.as_tensor(timestep).long()
        return torch.from_numpy(self._gammas).to(torch.float32)[index.cpu() + 1].to(index.device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> PaletteSchedulerOutput | tuple:
        """One step of Algorithm 2: y_t => y_{t-1}. Computed in float32, returned in the sample's dtype.

        The mean is written by way of the predicted y0, so that it can be clipped; unclipped, it equals the
        paper's (y_t - (1 - alpha_t) / sqrt(1 - gamma_t) f) / sqrt(alpha_t). `eta` is how much of the noise is new, as
        in DDIM (Song et al. 2021): 0 is "zero" and 1 "fixed_small", whatever `sampling_variance` says; None follows it.
        `variance_noise`, of the sample's shape, is taken instead of noise by the generator.
        """
        t = int(timestep)
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected 0 (no new noise) to 1 (ancestral)")
        if not 0 <= t < len(self._gammas) - 1:
            raise ValueError(f"timestep is {t}, expected 0 to {len(self._gammas) - 2}: call set_timesteps first")
        gamma, gamma_prev = float(self._gammas[t + 1]), float(self._gammas[t])
        alpha = gamma / gamma_prev
        y = sample.float()
        y0 = predicted_original(model_output, y, gamma, self.config.prediction_type)
        if self.config.clip_sample:
            clamp = y0.clamp if self.config.prediction_type == "sample" else y0.clamp_  # which may be the output itself
            y0 = clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        large = eta is None and self.config.sampling_variance == "fixed_large"
        if eta is None:
            eta = 0.0 if self.config.sampling_variance == "zero" else 1.0
        ratio, new = (1 - gamma_prev) / (1 - gamma), 1 - alpha  # variances of the noise, and of the step's
        kept = (ratio * (1 - eta**2 + eta**2 * alpha * ratio)) ** 0.5
        share = gamma_prev**0.5 - kept * gamma**0.5
        before, ahead = self._ahead(t, y0) if self.config.sampling_order == 2 and not large else (y0, 0.0)
        mean = (y * kept).add_(y0, alpha=share * (1 + ahead))  # one tensor, changed in place, as pictures are large
        if ahead:
            mean.add_(before, alpha=-share * ahead)
        if t > 0 and eta:
            if variance_noise is None:
                variance_noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
            mean.add_(variance_noise.to(y), alpha=eta * (new if large else new * ratio) ** 0.5)
        mean, y0 = mean.to(sample.dtype), y0.to(sample.dtype)
        return PaletteSchedulerOutput(mean, y0) if return_dict else (mean, y0)

    def _ahead(self, t: int, y0: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The y0 of the step before, and how far beyond this one's the middle of the step is, on a straight line in
        log-SNR through the two; 0 for the first step, and for that to the picture itself."""
        before, self._before = self._before, (t, y0) if t else None
        if t == 0 or before is None or before[0] != t + 1 or before[1].shape != y0.shape:
            return y0, 0.0
        later, now, earlier = (np.log(g) - np.log1p(-g) for g in self._gammas[t : t + 3])
        return before[1], float(0.5 * (later - now) / (now - earlier))
