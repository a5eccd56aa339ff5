"""What this machine gains from, found by measuring: each way is timed against what there is, and kept if it is faster
and leaves the pictures alike."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .machine import best_dtype
from .norms import use_channels_last_norms
from .sizes import at_once
from .tasks import Given
from .winograd import WinogradConv2d, use_winograd

ALIKE = 40.0  # PSNR in dB, of a picture from the same seed, against eager float32
GAIN = 1.03  # times as fast, at least, to be worth a change: one picture and a batch of tiles, their geometric mean
LOSS = 0.9  # and neither less than this


@dataclass(frozen=True)
class Trial:
    """speedup: times as fast as what there was before, for one picture; `speedup_tiles` for a batch of a large
    photograph's tiles. psnr: in dB, against eager float32; inf where equal."""

    name: str
    kept: bool
    speedup: float = 0.0
    speedup_tiles: float = 0.0
    psnr: float = 0.0
    failed: str = ""

    def __str__(self) -> str:
        if self.failed:
            return f"{self.name}: not possible here ({self.failed})"
        verdict = "kept" if self.kept else "left out"
        fast = f"{self.speedup:.2f} (large photographs {self.speedup_tiles:.2f}) times as fast"
        return f"{self.name}: {verdict}, {fast}, PSNR {self.psnr:.1f} dB against float32"


@dataclass(frozen=True)
class Optimized:
    """What was tried, in order, and milliseconds of a network evaluation before and after: of one picture, and of each
    tile of a large photograph."""

    trials: tuple[Trial, ...]
    before: float
    after: float
    before_tile: float
    after_tile: float

    def __str__(self) -> str:
        one = f"an evaluation takes {self.after:.1f} ms, before {self.before:.1f}"
        tile = f"of a large photograph's tile {self.after_tile:.1f}, before {self.before_tile:.1f}"
        return "\n".join([*map(str, self.trials), f"{one}; {tile}"])


def worth(*speedups: float) -> bool:
    """Whether a change gains on the whole and loses little anywhere."""
    return math.prod(speedups) ** (1 / len(speedups)) >= GAIN and min(speedups) >= LOSS


def optimize(pipe: Any, compile: bool = False, int8: bool = False, rounds: int = 7) -> Optimized:
    """Changes the pipeline's network to what computes fastest here: one picture of the model's size, and a batch of a
    large photograph's tiles (what gains nothing for the one may double the other).

    Three copies of the weights are in memory meanwhile; afterwards one, and with "winograd" four more of the 3x3
    convolutions' weights. `compile` also tries `torch.compile`, which takes minutes, and on CUDA its CUDA graphs
    (not run so far); `int8` also tries 8-bit weights in linear layers, alone and with 8-bit activations, by torchao.

    Raises:
        ValueError: the network is exported or offloaded.
    """
    found = pipe.unet
    _check_changeable(found)
    modes = {name: module.training for name, module in found.named_modules()}
    found.eval()  # dropout would be taken for a loss of precision
    try:
        return _optimized(pipe, compile, int8, rounds)
    finally:
        for network in (found, pipe.unet):
            for name, module in network.named_modules():
                module.training = modes.get(name, module.training)


def _check_changeable(network: Any) -> None:
    """Raises:
    ValueError: a network that can't be changed, or whose weights come and go.
    """
    if getattr(network, "exported", False):
        raise ValueError("the network is exported and can't be changed: optimize the pipeline it was exported from")
    hooked = any(hasattr(module, "_hf_hook") for module in network.modules())
    if hooked or any(weight.is_meta for weight in network.parameters()):
        raise ValueError("the network is offloaded, or has a device_map: optimize before, or call remove_all_hooks()")


def _optimized(pipe: Any, compile: bool, int8: bool, rounds: int) -> Optimized:
    found = pipe.unet
    size, device = found.config.sample_size, found.device
    given = _given(size, device)
    reference = _picture(pipe, copy.deepcopy(found).float(), given)
    ways: dict[str, Callable[[Any], Any]] = {}
    half = best_dtype(device.type)
    if half not in (torch.float32, found.dtype):
        # torch's own, since diffusers' warns of modules to be kept in float32, where there are none
        ways[str(half).removeprefix("torch.")] = lambda network: torch.nn.Module.to(network, half)
    ways["channels_last"] = _channels_last
    if device.type == "cpu":
        ways["winograd"] = _winograd
    if int8:
        ways["int8 weights"] = lambda network: _int8(network, "Int8WeightOnlyConfig")
        ways["int8 weights and activations"] = lambda network: _int8(network, "Int8DynamicActivationInt8WeightConfig")
    if compile:
        ways["torch.compile"] = lambda network: _compiled(network, dynamic=True)
    if compile and device.type == "cuda":
        ways["CUDA graphs"] = lambda network: _compiled(network, mode="reduce-overhead")

    trials, best = [], found
    for name, way in ways.items():
        try:
            candidate = way(copy.deepcopy(best))
            psnr = _psnr(_picture(pipe, candidate, given), reference)
            speedups = [before / after for before, after in _both([best, candidate], given, rounds)]
        except (RuntimeError, ImportError, FloatingPointError) as error:  # no compiler, or an overflow, say
            reason = str(error).strip() or type(error).__name__
            trials.append(Trial(name, False, failed=reason.splitlines()[0][:200]))
            continue
        kept = worth(*speedups) and psnr >= ALIKE
        trials.append(Trial(name, kept, speedups[0], speedups[1], psnr))
        best = candidate if kept else best
    one, tiles = _both([found, best], given, rounds)
    if one[0] * tiles[0] < one[1] * tiles[1]:
        best, one, tiles = found, [one[0]] * 2, [tiles[0]] * 2
    pipe.unet = best
    return Optimized(tuple(trials), *(1e3 * seconds for seconds in (*one, *tiles)))


def _channels_last(network: Any) -> Any:
    use_channels_last_norms(network)
    return network.to(memory_format=torch.channels_last)


def _winograd(network: Any) -> Any:
    """Raises:
    RuntimeError: nothing to gain.
    """
    if network.dtype != torch.float32:
        raise RuntimeError(f"it is for float32, the network is in {str(network.dtype).removeprefix('torch.')}")
    if any(isinstance(layer, WinogradConv2d) for layer in network.modules()):
        raise RuntimeError("it is in use already")
    if not use_winograd(network):
        raise RuntimeError("no 3x3 convolution is wide enough")
    return network


def _int8(network: Any, config: str) -> Any:
    """Raises:
    ImportError: torchao is not installed.
    """
    from torchao import quantization

    if any(type(x.weight.data) is not torch.Tensor for x in network.modules() if isinstance(x, torch.nn.Linear)):
        raise RuntimeError("its weights are quantized already")
    quantization.quantize_(network, getattr(quantization, config)())
    return network


def _compiled(network: Any, **options: Any) -> Any:
    """Raises:
    RuntimeError: inductor finds no C++ compiler.
    """
    if network.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    network.compile(**options)
    return network


def _given(size: int, device: torch.device) -> Given:
    """A smooth picture, the same every time."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False).to(device)
    return Given(known=picture, condition=picture)


def _picture(pipe: Any, network: Any, given: Given) -> torch.Tensor:
    """What the whole sampler makes of it with this network, from one seed."""
    found = pipe.unet
    pipe.unet = network
    try:
        return pipe.denoise(given, torch.Generator().manual_seed(0)).cpu().clamp(-1, 1)
    finally:
        pipe.unet = found


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a - b).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def _both(networks: list[Any], given: Given, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a picture of each network: one picture alone, and as many as tiles are evaluated at once."""
    one = _seconds(networks, given, rounds)
    number = at_once(given.known[0, 0].numel())
    if number == 1:
        return one, one
    tiles = _seconds(networks, given, max(1, rounds // 2), number)
    return one, [seconds / number for seconds in tiles]


@torch.no_grad()
def _seconds(networks: list[Any], given: Given, rounds: int, number: int = 1) -> list[float]:
    """Median seconds of an evaluation of `number` pictures by each, one of each in turn."""
    extra = bool(networks[0].config.hole_skip)
    condition = F.pad(given.condition, (0, 0, 0, 0, 0, 1)) if extra else given.condition
    sample, condition = (x.expand(number, -1, -1, -1).contiguous() for x in (given.known, condition))
    times: list[list[float]] = [[] for _ in networks]
    for i in range(rounds + 1):
        for network, seconds in zip(networks, times, strict=True):
            begin = time.perf_counter()
            network(sample, 0.5, condition, return_dict=False)[0][0, 0, 0, 0].item()
            if i:  # the first sets things up
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]
