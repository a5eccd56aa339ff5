"""Photographs to try a task on. What the first click makes is kept: every later one shows it at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .demo_handlers import Handlers, Moment, Result, Settings

PHOTOGRAPHS = Path(__file__).with_name("photographs")
EXAMPLES = {
    "colorization": ("cameraman-gray.jpg", "cat-gray.jpg"),
    "inpainting": ("coffee.jpg", "cat.jpg"),
    "uncropping": ("canyon.jpg", "coffee.jpg"),
    "jpeg_restoration": ("cat-jpeg.jpg", "astronaut-jpeg.jpg"),
}
RIGHT = 25  # percent that an example is extended by
GROW = 4  # pixels that a mask is


def beside_of(photo: Path) -> Path | None:
    """What belongs to an example: its mask, or its strokes of colour."""
    each = (photo.with_name(f"{photo.stem}-{kind}.png") for kind in ("mask", "strokes"))
    return next((path for path in each if path.is_file()), None)


class Examples:
    """The examples' results, by the settings that nobody touched and seed 0; a task has two of them, so that memory is
    bounded."""

    def __init__(self, handlers: Handlers, steps: int):
        self.handlers = handlers
        self.settings = Settings(seed=0, steps=steps, samples=1, solver=None)
        self.kept: dict[tuple[str, int], Result] = {}

    def moments(self, task: str, number: int, session: str) -> Iterator[Moment]:
        """As `Handlers.moments`; of one that is kept, the result alone."""
        if (task, number) in self.kept:
            yield self.kept[task, number]
            return
        photo = PHOTOGRAPHS / EXAMPLES[task][number]
        picture = self.handlers.photo(photo)
        options: dict[str, Any] = {}
        beside = beside_of(photo)
        if task == "inpainting":
            options["mask_image"] = self.handlers.mask(picture, None, beside, False, GROW)
        if task == "colorization" and beside is not None:
            options = self.handlers.hints(picture, None, beside)
        if task == "uncropping":
            options = dict(self.handlers.sides(picture, 0, RIGHT, 0, 0))
        for moment in self.handlers.moments(task, photo, picture, self.settings, session, **options):
            if isinstance(moment, Result):
                self.kept[task, number] = moment
            yield moment
