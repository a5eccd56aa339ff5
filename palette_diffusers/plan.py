"""What a photograph will take, before it is done: the pipeline itself is run, with a network that only counts."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .canvas import ImageInput
from .pipeline import PalettePipeline


@dataclass(frozen=True)
class Plan:
    """evaluations: (batch, height, width) that the network will see => how often. seconds: in all, of which
    `network_seconds` in the network. memory: peak of the process so far, in bytes; 0 where it isn't known."""

    evaluations: dict[tuple[int, int, int], int]
    seconds: float
    network_seconds: float
    memory: int

    def __str__(self) -> str:
        lines = [
            f"{count} x {batch} of {width}x{height} pixels"
            for (batch, height, width), count in self.evaluations.items()
        ]
        memory = f", {self.memory / 2**30:.2f} GiB" if self.memory else ""
        total = f"about {self.seconds:.1f} s, {self.network_seconds:.1f} s of it in the network{memory}"
        return "\n".join(["network evaluations (each a batch):", *(f"  {line}" for line in lines), total])


def plan(pipe: PalettePipeline, image: ImageInput, **options: Any) -> Plan:
    """The network evaluations, time and memory of `pipe(image, **options)`.

    Each size of batch is timed once, by the real network; all else is done as it will be, and timed, too. A generator
    is left as it was, and `callback_on_step_end` is not called.

    Raises:
        As the pipeline: bad input is found here.
    """
    seen: Counter[tuple[int, ...]] = Counter()

    def counting(sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        seen[tuple(sample.shape)] += 1
        return torch.zeros_like(sample)

    options = {name: value for name, value in options.items() if name != "callback_on_step_end"}
    options["generator"] = _copied(options.get("generator"))
    begin = time.perf_counter()
    pipe._predict = counting  # type: ignore[method-assign]
    try:
        pipe(image, output_type="pt", **options)
    finally:
        del pipe._predict
    rest = time.perf_counter() - begin
    network = sum(count * _seconds(pipe, shape) for shape, count in seen.items())
    evaluations = {(shape[0], shape[2], shape[3]): count for shape, count in seen.items()}
    return Plan(evaluations, rest + network, network, _peak())


def _copied(generator: Any) -> Any:
    """The same numbers, which the caller's own still has to give."""
    if isinstance(generator, (list, tuple)):
        return [_copied(one) for one in generator]
    if generator is None:
        return None
    return torch.Generator(generator.device).set_state(generator.get_state())


@torch.no_grad()
def _seconds(pipe: PalettePipeline, shape: tuple[int, ...]) -> float:
    """The faster of two evaluations: the first also sets things up."""
    sample = torch.zeros(shape, device=pipe._execution_device)
    condition = sample.new_zeros(shape[0], 3 + bool(pipe.unet.config.hole_skip), *shape[2:])
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        pipe._predict(sample, torch.tensor(0.5, device=sample.device), condition)[0, 0, 0, 0].item()
        times.append(time.perf_counter() - begin)
    return min(times)


def _peak() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
