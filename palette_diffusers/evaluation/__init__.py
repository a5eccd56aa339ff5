"""The paper's evaluation protocol: any restorer, the same pixels, figures whose names say what they are made of.

    from palette_diffusers.evaluation import evaluate

Names are loaded on first use.
"""

from importlib import import_module

_ROOMS = {
    "evaluate": "run",
    "Photographs": "inputs",
    "load_features": "features",
    "load_lpips": "lpips",
    "load_restorer": "restorers",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "Moments": "metrics",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
