import pytest
import torch
from conftest import toy_unet
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.cli import app
from palette_diffusers.portable import FILES, inputs_for, load_portable, write_portable


@pytest.mark.parametrize("kind", list(FILES))
def test_the_same_pictures(kind, photo, tmp_path, seeded):
    """Of any size, through the same pipeline, from a folder that is read anew."""
    pytest.importorskip("onnxscript")
    unet = toy_unet(condition_skip=0.2, hole_skip=0.5, patch_size=2)
    pipe = PalettePipeline(unet, PaletteScheduler(prediction_type="v_prediction", sampling_spacing="logsnr"))
    pipe.speed("fast").set_progress_bar_config(disable=True)
    error = write_portable(pipe, tmp_path / "out", kind)
    loaded = load_portable(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert 0 <= error < 1e-3 and loaded.config.default_steps == 4 and not list(tmp_path.glob("*.part"))
    for extra in ({"task": "colorization", "num_images_per_input": 2}, {"task": "uncropping", "right": 0.2}):
        a, b = (p(photo, generator=seeded(), output_type="pt", **extra).images for p in (pipe, loaded))
        assert (a - b).abs().max() < 0.02, extra
    with pytest.raises(ValueError, match="the network is exported and can't be changed"):
        loaded.optimize()
    same_interface(unet, loaded.unet)


def same_interface(unet, exported):
    """Dtype, no pictures, and what is refused."""
    sample, gamma, condition = inputs_for(unet, 2, 32, 36)
    assert exported(sample.double(), 0.5, condition).sample.dtype == torch.float64
    assert exported(sample[:0], 0.5, condition[:0]).sample.shape == (0, 3, 32, 36)
    for wrong in (
        (sample[..., :34], gamma, condition[..., :34]), (sample, gamma, condition[:1]), (sample, 0.0, condition),
        (sample[:, :2], gamma, condition), (sample, torch.ones(3), condition),
    ):  # fmt: skip
        messages = []
        for network in (unet, exported):
            with pytest.raises(ValueError) as error:
                network(*wrong)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_what_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="format is 'tflite', expected onnx, torch"):
        write_portable(pipe, tmp_path / "a", "tflite")
    with pytest.raises(FileExistsError, match="there already"):
        write_portable(pipe, tmp_path)
    with pytest.raises(FileNotFoundError, match="portable.json"):
        load_portable(tmp_path)


def test_a_damaged_one_is_told_and_none_is_moved(pipe, tmp_path):
    pipe.unet.bfloat16()
    write_portable(pipe, tmp_path / "out", "torch")
    assert pipe.unet.dtype == torch.bfloat16, "the caller's stays as it was"
    loaded = load_portable(tmp_path / "out").to(torch.bfloat16)
    assert loaded.unet.dtype == torch.float32
    assert loaded.unet(*inputs_for(loaded.unet, 1, 32, 32)).sample.dtype == torch.float32
    network = tmp_path / "out" / "unet" / "network.pt2"
    about, content = (tmp_path / "out" / "portable.json").read_text(), network.read_bytes()
    renamed = about.replace("PaletteScheduler", "None").encode()
    for path, damaged in (
        (network, content[:999]), (tmp_path / "out" / "portable.json", renamed),
        (tmp_path / "out" / "unet" / "config.json", b"{}"),
    ):  # fmt: skip
        whole = path.read_bytes()
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="out is damaged, export it again: "):
            load_portable(tmp_path / "out")
        path.write_bytes(whole)


def test_a_difference_is_found(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("palette_diffusers.portable.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differs by"):
        write_portable(pipe, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_command(pipe, photo, tmp_path):
    pytest.importorskip("onnxscript")
    pipe.save_pretrained(tmp_path / "pipe")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    runner = CliRunner()
    done = runner.invoke(app, ["export-network", str(tmp_path / "pipe"), str(tmp_path / "out")])
    assert done.exit_code == 0 and "differs by" in done.output
    command = ["colorize", str(tmp_path / "photo.png"), "--model", str(tmp_path / "out"), "--speed", "fast"]
    assert runner.invoke(app, command).exit_code == 0 and (tmp_path / "photo-colorization.png").is_file()
    refused = runner.invoke(app, [*command, "--speed", "warp"])
    assert refused.exit_code == 2
