"""How fast or how good: solver and steps by a name.

Chosen from a measured curve of quality against evaluations (`benchmarks/solvers.py`): our second-order sampler is as
good as UniPC on colorization, inpainting and uncropping, better on JPEGs, and leaves no weave in large fills. Where a
checkpoint names a student for few steps, "fast" is that (`PalettePipeline.speed`).
"""

import inspect
import logging
from typing import Any

import diffusers

from .scheduler import PaletteScheduler

FAST = "fast"
SPEEDS = {
    # name: (solver, steps)
    FAST: ("PaletteScheduler", 4),
    "balanced": ("PaletteScheduler", 8),
    "best": ("PaletteScheduler", 16),
}
SECOND_ORDER = {"sampling_spacing": "logsnr", "sampling_variance": "zero", "sampling_order": 2}


def check(name: str) -> None:
    """Raises:
    ValueError: no such preset; the message lists those that are known.
    """
    if name not in SPEEDS:
        raise ValueError(f"speed is {name!r}, expected {', '.join(SPEEDS)}")


def solver_for(name: str, config: Any) -> tuple[Any, int]:
    """A preset's solver, built from a scheduler's configuration, and its number of steps.

    Raises:
        ValueError: no such preset; the message lists those that are known.
    """
    check(name)
    solver, steps = SPEEDS[name]
    return named(solver, config), steps


def named(solver: str, config: Any) -> Any:
    """A solver of diffusers by its name, or ours in second order, built from a scheduler's configuration."""
    if solver == "PaletteScheduler":
        return build(PaletteScheduler, config, **SECOND_ORDER)
    return build(getattr(diffusers, solver), config)


def build(kind: Any, config: Any, **changes: Any) -> Any:
    """A scheduler of this class from another one's configuration, with changes of it. Our own settings are kept in any
    class, where `from_config` would drop changed ones that it doesn't know."""
    settings = dict(config) | changes
    defaults = {name: p.default for name, p in inspect.signature(PaletteScheduler.__init__).parameters.items()}
    settings["_use_default_values"] = [
        name
        for name in settings.get("_use_default_values", ())
        if name not in changes and settings.get(name) == defaults.get(name)
    ]
    warnings = logging.getLogger("diffusers.configuration_utils")
    level = warnings.level
    warnings.setLevel(logging.ERROR)  # of our own settings, which the library's solver keeps and does not use
    try:
        return kind.from_config(settings)
    finally:
        warnings.setLevel(level)
