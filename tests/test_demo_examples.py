"""Examples: the first click makes the result, every later one shows it."""

import numpy as np
import pytest
import torch
from PIL import Image

gr = pytest.importorskip("gradio")

from palette_diffusers import demo  # noqa: E402
from palette_diffusers.demo_examples import EXAMPLES, PHOTOGRAPHS, Examples, beside_of  # noqa: E402
from palette_diffusers.demo_handlers import Handlers, Result  # noqa: E402
from palette_diffusers.demo_jobs import Step  # noqa: E402
from palette_diffusers.demo_limits import Limits  # noqa: E402


class Request:
    session_hash = "visitor"


def test_the_first_click_makes_what_later_ones_show(pipe):
    examples = Examples(Handlers(pipe, Limits()), 1)
    for task in EXAMPLES:
        for number in range(2):
            *steps, made = examples.moments(task, number, "a")
            assert steps and all(isinstance(step, Step) for step in steps) and isinstance(made, Result)
            assert list(examples.moments(task, number, "b")) == [made]
    assert len({made.after.tobytes() for made in examples.kept.values()}) == 8


def test_an_example_is_what_the_pipeline_makes(pipe):
    examples, seeded = Examples(Handlers(pipe, Limits()), 2), lambda: torch.Generator().manual_seed(0)
    photo = PHOTOGRAPHS / "cat.jpg"
    *_, made = examples.moments("inpainting", 1, "a")
    hole = np.asarray(made.after) != np.asarray(made.before)
    assert 0.001 < hole.mean() < 0.5 and beside_of(photo).name == "cat-mask.png"
    *_, made = examples.moments("colorization", 1, "a")
    photo = PHOTOGRAPHS / "cat-gray.jpg"
    hints = {"hints": PHOTOGRAPHS / "cat-gray-strokes.png", "generator": seeded(), "num_inference_steps": 2}
    told = pipe(photo, task="colorization", **hints).images[0]
    assert np.abs(np.asarray(made.after).astype(int) - np.asarray(told)).max() <= 1
    assert beside_of(PHOTOGRAPHS / "cameraman-gray.jpg") is None
    *_, made = examples.moments("uncropping", 1, "a")
    given = PHOTOGRAPHS / "coffee.jpg"
    right = made.after.width - Image.open(given).width
    expected = pipe(given, task="uncropping", right=right, generator=seeded()).images[0]
    assert np.abs(np.asarray(made.after).astype(int) - np.asarray(expected)).max() <= 1


def test_the_page_shows_a_kept_one_at_once(pipe):
    page = demo.Page(Handlers(pipe, Limits()))
    click = page._example("Colorize")
    first, second = list(click(Request(), 0)), list(click(Request(), 0))
    assert "Done in" in first[-1][page.status] and len(second) == 2 and "kept" in second[-1][page.status]
    assert second[-1][page.download]["interactive"] and second[0][page.seed] == 0
    for number in (-1, 2, 0.5, None, "0", [0]):
        with pytest.raises(gr.Error, match="example is .*expected a whole number from 0 to 1"):
            list(click(Request(), number))
