import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_unet
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.data import PaletteDataset, load_images, random_crop
from palette_diffusers.training import (
    PRESETS,
    TrainSettings,
    last_state,
    learning_rate,
    masked_loss,
    preset,
    train,
    training_loss,
)

TRAIN = Path(__file__).parents[1] / "train" / "train_palette.py"
TASKS = ["colorization", "inpainting", "uncropping", "jpeg_restoration"]


@pytest.fixture
def folder(tmp_path, photo):
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(photo[i * 10 : i * 10 + 80, i * 10 : i * 10 + 90]).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def dataset(folder):
    images = load_images(str(folder))
    return PaletteDataset(images, PaletteScheduler(), TASKS, crops=images, size=32, seed=3)


def settings(folder, output, **changes) -> TrainSettings:
    unet = dict(toy_unet().config)
    unet = {k: list(v) if isinstance(v, tuple) else v for k, v in unet.items() if not k.startswith("_")}
    base = replace(
        preset("starter-64"), data=str(folder), output=str(output), size=32, batch=4, steps=4, workers=0,
        save_every=2, log_every=1, unet=unet, warmup=1,
    )  # fmt: skip
    return replace(base, **changes)


def test_samples_are_functions_of_position(dataset):
    for position in (0, 7, 1000):
        a, b = dataset[position], dataset[position]
        assert all(torch.equal(a[k], b[k]) for k in a)
    noises = {dataset[i]["noise"].numpy().tobytes() for i in range(40)}
    assert len(noises) == 40  # no two positions, so no two epochs or workers, repeat
    masks = [dataset[i]["mask"] for i in range(60)]
    drawn = {m.numpy().tobytes() for m in masks if not m.all()}
    holes = sum(not m.all() for m in masks)
    assert len(drawn) > 0.6 * holes  # uncropping has five masks only


def test_condition_noise_is_not_the_starting_noise(dataset):
    for i in range(30):
        sample = dataset[i]
        if not sample["mask"].all():
            hole = sample["mask"].expand(3, -1, -1) > 0.5
            assert not torch.isclose(sample["condition"][hole], sample["noise"][hole]).any()


def test_crops_do_not_distort():
    y, x = np.mgrid[0:300, 0:200]
    ramp = np.stack([y * 255 / 300, x * 255 / 300, y * 0], -1).astype(np.uint8)
    crop = random_crop(ramp, 64, np.random.default_rng(0)).astype(float)
    assert crop.shape == (64, 64, 3)
    down, across = np.diff(crop[..., 0].mean(1)).mean(), np.diff(crop[..., 1].mean(0)).mean()
    assert down == pytest.approx(across, rel=0.1)


def test_loss_counts_the_hole_only_and_per_sample():
    output, target = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    target[1] = 3
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, 0, 0] = 1  # a small hole weighs as much as a large one
    mask[1, :, :, :2] = 1
    target[:, :, 3, 3] = 100  # outside both
    assert masked_loss(output, target, mask).item() == pytest.approx((1 + 9) / 2)


def test_training_learns(dataset):
    """On one fixed batch the loss falls far below that of the zero network."""
    batch = {k: torch.stack([dataset[i][k] for i in range(8)]) for k in dataset[0]}
    unet = toy_unet().train()
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = training_loss(unet, batch, "epsilon")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_resume_equals_an_uninterrupted_run(folder, tmp_path):
    train(settings(folder, tmp_path / "a"))
    train(settings(folder, tmp_path / "b", steps=2))
    train(settings(folder, tmp_path / "b", resume=True))
    a, b = last_state(tmp_path / "a"), last_state(tmp_path / "b")
    assert a["step"] == b["step"] == 4
    for part in ("unet",):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        assert torch.equal(x, y)


def test_published_weights_are_the_average(folder, tmp_path):
    final = train(settings(folder, tmp_path / "run"))
    pipe = PalettePipeline.from_pretrained(final)
    state = last_state(tmp_path / "run")
    for p, shadow in zip(pipe.unet.parameters(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(p, shadow)
    assert not torch.equal(pipe.unet.conv_in.weight, state["unet"]["conv_in.weight"])
    assert pipe.config.tasks == TASKS and pipe.scheduler.config.prediction_type == "v_prediction"
    train(settings(folder, tmp_path / "tuned", init=str(final), steps=1))


def test_learning_rate():
    s = replace(TrainSettings(), rate=1.0, warmup=10, steps=100, decay=20)
    assert learning_rate(s, 4) == pytest.approx(0.5)
    assert learning_rate(s, 50) == 1 and learning_rate(s, 90) == pytest.approx(0.5)


def test_presets_build():
    from palette_diffusers import PaletteUNet2DModel

    for name in PRESETS:
        with torch.device("meta"):
            PaletteUNet2DModel(**preset(name).unet)
    with pytest.raises(ValueError, match="starter-64"):
        preset("starter")


def test_command_line(folder, tmp_path):
    """`accelerate launch`, as the README has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(TRAIN),
        "--data", str(folder), "--output", str(tmp_path / "run"), "--steps", "1", "--batch", "2",
        "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_bad_data(tmp_path):
    for arguments, message in (
        (["--data", str(tmp_path)], "holds no train-*.parquet and no images"),
        (["--data", str(tmp_path / "none")], "is no folder"),
        ([], "data is empty"),
    ):
        done = subprocess.run([sys.executable, str(TRAIN), *arguments, "--output", str(tmp_path / "run")],
            capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 2 and message in done.stderr
