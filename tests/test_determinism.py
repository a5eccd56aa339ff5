"""The same seed: the same noise, whatever else is in the batch and in whatever order; the same picture in other
processes and later versions. (Of training and evaluation, their own tests say it: workers, processes, resume.)"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import FOLDER, OPTIONS
from PIL import Image

from palette_diffusers import sizes

ROOT = Path(__file__).parents[1]
LEVELS, MEAN = 3, 0.1  # of 255: how far another machine's sums may lead a pixel, and all pixels on average
TASKS = {
    "colorization": {},
    "inpainting": {"mask_image": "50,40,90,70"},
    "uncropping": {"left": 10, "top": 0.1},
    "jpeg_restoration": {},
}


@pytest.fixture
def first_inputs(pipe):
    """What the network sees at its noisiest level, a list of single samples with their conditions."""

    def watch(*arguments, **options):
        calls = []
        hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
        options = {"output_type": "pt"} | options
        images = pipe(*arguments, **options).images
        hook.remove()
        noisiest = min(float(gamma) for _, gamma, _ in calls)
        seen = [torch.cat([x, c], 1).split(1) for x, gamma, c in calls if float(gamma) == noisiest]
        return [one for some in seen for one in some], images

    return watch


def equal(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_noise_in_any_batch(first_inputs, photo, task, seeded):
    photo = photo[:90, :110]
    pictures = [photo, photo[::-1].copy(), photo[:, ::-1].copy()]
    options = TASKS[task]
    if "mask_image" in options:
        options = {"mask_image": [options["mask_image"]] * 3}
    together, images = first_inputs(pictures, task, generator=[seeded(i) for i in range(3)], **options)
    alone, worst = [], 0.0
    for i, picture in enumerate(pictures):
        seen, image = first_inputs(picture, task, generator=seeded(i), **TASKS[task])
        alone += seen
        worst = max(worst, (image[0] - images[i]).abs().max().item())
    assert equal(together, alone) and worst < 1 / 127.5  # 1 of 255 levels
    assert not any(torch.equal(a, b) for a, b in zip(together, together[1:], strict=False))


@pytest.mark.parametrize("task", TASKS)
def test_a_variation_has_its_noise_whatever_their_number(first_inputs, photo, task, seeded):
    def run(number):
        options = dict(num_images_per_input=number, generator=seeded(4)) | TASKS[task]
        return first_inputs(photo[:90, :110], task, **options)

    (one, image), (three, images) = run(1), run(3)
    # a border's later strips see what the ones before made, to the rounding of a batch: hardly; noise of another seed
    # would be off by far more
    same = three[::3]
    assert torch.equal(one[0], same[0]) and (task == "uncropping" or equal(one, same))
    torch.testing.assert_close(one, same, atol=1e-4, rtol=0)
    assert (image[0] - images[0]).abs().max() < 1 / 127.5


def test_the_same_noise_in_any_order_of_tiles(first_inputs, photo, monkeypatch, seeded):
    def run():
        return first_inputs(photo[:48], "jpeg_restoration", generator=seeded(0))

    seen, image = run()
    forward = sizes.tile_places
    monkeypatch.setattr(sizes, "tile_places", lambda *given: forward(*given)[::-1])
    backward, again = run()
    assert len(seen) == 2 and equal(seen, backward[::-1]) and not equal(seen, backward)
    assert (image - again).abs().max() < 1 / 127.5


def test_tiles_of_any_batch(unet, seeded):
    sample, condition = torch.randn(2, 1, 3, 80, 112, generator=seeded()).unbind()
    predict = lambda *given: unet(*given, return_dict=False)[0]  # noqa: E731
    with torch.no_grad():
        outputs = [sizes.tiled(predict, 32, 16, batch=n)(sample, torch.tensor(0.5), condition) for n in (1, 3, 99)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The golden pictures, by two processes at once, of one thread each."""
    folders = [tmp_path_factory.mktemp("golden") for _ in range(2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "golden.py")]
    processes = [subprocess.Popen([*command, str(folder)], env=environment) for folder in folders]
    assert [process.wait() for process in processes] == [0, 0]
    return folders


@pytest.mark.parametrize("task", OPTIONS)
def test_the_same_bytes_in_another_process(made, task):
    first, second = ((folder / f"{task}.png").read_bytes() for folder in made)
    assert first == second


@pytest.mark.parametrize("task", OPTIONS)
def test_the_picture_of_earlier_versions(made, task):
    expected, now = (np.asarray(Image.open(folder / f"{task}.png")).astype(int) for folder in (FOLDER, made[0]))
    assert now.shape == expected.shape
    assert np.abs(now - expected).max() <= LEVELS and np.abs(now - expected).mean() <= MEAN
