"""Every example in a docstring runs."""

import doctest
import importlib

import pytest

ROOMS = (
    "canvas", "demo_limits", "evaluation.fool_rate", "evaluation.inputs", "evaluation.metrics", "evaluation.pages",
    "folders", "masks", "pipeline", "scheduler", "sizes", "tasks", "training", "unet",
)  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_examples(room):
    result = doctest.testmod(importlib.import_module(f"palette_diffusers.{room}"))
    assert result.failed == 0
