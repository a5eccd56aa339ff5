"""Palette: image-to-image diffusion on the Hugging Face stack. Names are loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import PalettePipeline as PalettePipeline
    from .scheduler import PaletteScheduler as PaletteScheduler
    from .tasks import Given as Given
    from .tasks import Task as Task
    from .tasks import get_task as get_task
    from .tasks import register_task as register_task
    from .unet import PaletteUNet2DModel as PaletteUNet2DModel

__version__ = "0.1.0"

_ROOMS = {
    "PalettePipeline": "pipeline",
    "PaletteScheduler": "scheduler",
    "PaletteUNet2DModel": "unet",
    "Given": "tasks",
    "Task": "tasks",
    "get_task": "tasks",
    "register_task": "tasks",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
