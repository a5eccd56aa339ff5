"""Networks of other implementations, against outputs that these gave themselves (`fixtures/record.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_unet
from diffusers import DDPMScheduler, UNet2DModel
from fixtures.record import FOLDER, GAMMAS, LABEL, TIMESTEPS, fill, inputs
from safetensors.torch import save_file
from typer.testing import CliRunner

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.cli import app
from palette_diffusers.convert import convert, export

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
LEVELS = torch.cumprod(1 - BETAS, 0)[list(TIMESTEPS)]  # as diffusers' schedulers compute them


def original(name: str) -> tuple[dict, np.ndarray]:
    return json.loads((FOLDER / f"{name}.json").read_text()), np.load(FOLDER / f"{name}.npy")


def load(folder) -> PalettePipeline:
    pipe = PalettePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def levels(state: dict, steps: int, start: float, end: float, schedule=np.linspace) -> dict:
    """The state with the buffers of this schedule, as Janspiry's networks compute and save them."""
    betas = schedule(start, end, steps, dtype=np.float64)
    kept = {"gammas": np.cumprod(1 - betas)}
    if "betas" in state:
        kept = {"betas": betas, "alphas_cumprod": kept["gammas"]}
    return state | {name: torch.tensor(value, dtype=torch.float32) for name, value in kept.items()}


@pytest.fixture
def janspiry(tmp_path):
    """A checkpoint as Janspiry's code saves it, with its average and its configuration beside."""
    recorded, output = original("janspiry")
    state = levels(fill(recorded["layout"]), 2000, 1e-6, 0.01)
    half = {name: value * (1 if name == "gammas" else 0.5) for name, value in state.items()}
    torch.save(half, tmp_path / "10_Network.pth")
    torch.save(state, tmp_path / "10_Network_ema.pth")
    network = {"args": recorded["arguments"]}
    settings = {"model": {"which_model": {"args": {"task": "inpainting"}}, "which_networks": [network]}}
    (tmp_path / "config.json").write_text(json.dumps(settings, indent=1).replace("{", "{ // a comment", 1))
    return tmp_path, output


def test_janspiry(janspiry):
    folder, expected = janspiry
    done = run("convert", folder / "10_Network.pth", folder / "out", "--config", folder / "config.json")
    assert done.exit_code == 0, done.output
    pipe = load(folder / "out")
    y, x = inputs()
    with torch.no_grad():
        output = pipe.unet(y, torch.tensor(GAMMAS), x).sample
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert pipe.config.tasks == ["inpainting"] and pipe.unet.config.sample_size == 16
    assert pipe.config.default_steps == 1000 and pipe.scheduler.config.sampling_variance == "fixed_small"
    image, mask = torch.zeros(1, 3, 20, 20), torch.zeros(1, 1, 20, 20)
    mask[..., 5:12, 5:12] = 1
    assert pipe(image, mask_image=mask, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 20, 20)


def test_janspiry_without_average_or_configuration(janspiry):
    folder, expected = janspiry
    convert(folder / "10_Network.pth", folder / "out", head_channels=16, image_size=16, ema=False)
    half, (y, x) = load(folder / "out"), inputs()
    convert(folder / "10_Network_ema.pth", folder / "average", head_channels=16, image_size=16, tasks=["uncropping"])
    whole = load(folder / "average")
    with torch.no_grad():
        assert np.abs(half.unet(y, torch.tensor(GAMMAS), x).sample - expected).max() > 0.01
        np.testing.assert_allclose(whole.unet(y, torch.tensor(GAMMAS), x).sample, expected, atol=1e-5)
    assert whole.config.tasks == ["uncropping"]


@pytest.mark.parametrize("name", ["janspiry_sr3", "sr3"])
def test_sr3_networks(tmp_path, name):
    """Its own repository's, which is told sqrt(gamma), and that of Janspiry's Palette, which is told gamma."""
    recorded, expected = original(name)
    torch.save(levels(fill(recorded["layout"]), 2000, 1e-6, 0.01), tmp_path / "I10_E1_gen.pth")
    arguments = recorded["arguments"]
    if name == "sr3":
        betas = {"train": arguments["beta_schedule"], "val": arguments["beta_schedule"] | {"n_timestep": 100}}
        model = {"which_model_G": "sr3", "diffusion": {"image_size": 16}} | arguments | {"beta_schedule": betas}
    else:
        model = {"which_model": {"args": {"task": "colorization"}}, "which_networks": [{"args": arguments}]}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    done = run("convert", tmp_path / "I10_E1_gen.pth", tmp_path / "out", "--config", tmp_path / "config.json")
    assert done.exit_code == 0, done.output
    pipe, (y, x) = load(tmp_path / "out"), inputs()
    with torch.no_grad():
        np.testing.assert_allclose(pipe.unet(y, torch.tensor(GAMMAS), x).sample, expected, atol=1e-5)
    steps, task = (100, "paired") if name == "sr3" else (1000, "colorization")
    assert pipe.config.default_steps == steps and pipe.config.tasks == [task] and pipe.unet.config.sample_size == 16
    assert pipe(x[:1].clamp(-1, 1), num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["janspiry", "sr3"])
def test_the_schedule_of_the_file_is_taken(tmp_path, name):
    """2000 steps to 0.01 were taken in silence for a file of another schedule without its configuration."""
    state = fill(original(name)[0]["layout"])
    keys = ("num_train_timesteps", "beta_start", "beta_end")
    own = (1000, 1e-4, 0.02)
    for i, (saved, trained, sampled) in enumerate((
        (own, own, own),
        ((50, 1.25e-3, 0.3), (50, 1.25e-3, 0.3), (50, 1.25e-3, 0.3)),
        ((2000, 1e-6, 0.01), (2000, 1e-6, 0.01), (1000, 1e-4, 0.09) if name == "janspiry" else (2000, 1e-6, 0.01)),
    )):  # fmt: skip
        torch.save(levels(state, *saved), tmp_path / "file.pth")
        convert(tmp_path / "file.pth", tmp_path / f"{i}", head_channels=16, image_size=16)
        config = load(tmp_path / f"{i}").scheduler.config
        assert [config[key] for key in keys] == pytest.approx(trained)
        sampling = (config.sampling_timesteps, config.sampling_beta_start, config.sampling_beta_end)
        assert sampling == pytest.approx(sampled)

    def squared(start, end, steps, dtype):
        return np.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2

    torch.save(levels(state, *own, schedule=squared), tmp_path / "file.pth")
    done = run("convert", tmp_path / "file.pth", tmp_path / "out", "--head-channels", 16)
    assert done.exit_code == 2 and "no linear schedule" in done.stderr and not (tmp_path / "out").exists()


def test_a_configuration_of_another_schedule_is_refused(janspiry):
    folder, _ = janspiry
    for name in ("10_Network", "10_Network_ema"):
        state = torch.load(folder / f"{name}.pth", weights_only=True)
        torch.save(levels(state, 1000, 1e-4, 0.02), folder / f"{name}.pth")
    done = run("convert", folder / "10_Network.pth", folder / "out", "--config", folder / "config.json")
    assert done.exit_code == 2 and "'linear_end': 0.02" in done.stderr and "0.09" in done.stderr, done.output
    assert not (folder / "out").exists()


def test_adm_of_one_class(tmp_path):
    recorded, expected = original("adm_classes")
    torch.save(fill(recorded["layout"]), tmp_path / "adm.pt")
    arguments = ("convert", tmp_path / "adm.pt", tmp_path / "out", "--head-channels", 16, "--image-size", 16)
    for label, says in (([], "conditioned on 10 classes"), (["--label", 10], "0 to 9, not 10")):
        done = run(*arguments, *label)
        assert done.exit_code == 2 and says in done.stderr and not (tmp_path / "out").exists(), done.output
    done = run(*arguments, "--label", LABEL)
    assert done.exit_code == 0, done.output
    y, x = inputs()
    with torch.no_grad():
        np.testing.assert_allclose(load(tmp_path / "out").unet(y, LEVELS, x).sample, expected[:, :3], atol=1e-5)


def test_weights_that_are_missing_or_damaged_are_told(tmp_path):
    recorded, _ = original("adm")
    whole = fill(recorded["layout"])
    for i, (name, change, says) in enumerate((
        ("middle_block.1.qkv.weight", None, "no place in the network"),
        ("input_blocks.1.0.in_layers.2.weight", None, "Missing key"),
        ("out.2.weight", lambda x: x.flatten()[0], "shapes or names"),
        ("out.2.weight", lambda x: x * float("nan"), "not finite, conv_out.weight"),
        ("out.2.bias", lambda x: x[:1], "don't fit"),
    )):  # fmt: skip
        state = dict(whole)
        value = state.pop(name)
        torch.save(state if change is None else state | {name: change(value)}, tmp_path / "bad.pt")
        done = run("convert", tmp_path / "bad.pt", tmp_path / f"{i}", "--head-channels", 16, "--image-size", 16)
        assert done.exit_code == 2 and says in done.stderr, (name, done.output)
        assert not (tmp_path / f"{i}").exists()


@pytest.mark.parametrize("name", ["adm", "adm_new_order", "adm_conv"])
def test_adm(tmp_path, name):
    """Three channels in became six: the source, whatever it is, changes nothing yet."""
    recorded, expected = original(name)
    torch.save(fill(recorded["layout"]), tmp_path / "adm.pt")
    order = ["--new-attention-order"] if recorded["arguments"].get("use_new_attention_order") else []
    done = run("convert", tmp_path / "adm.pt", tmp_path / "out", "--head-channels", 16, "--image-size", 16, *order)
    assert done.exit_code == 0, done.output
    pipe = load(tmp_path / "out")
    y, x = inputs()
    with torch.no_grad():
        output = pipe.unet(y, LEVELS, x).sample
    np.testing.assert_allclose(output, expected[:, :3], atol=1e-5)  # the learned variance is left out
    assert pipe.unet.conv_in.weight[:, 3:].abs().max() == 0
    picture = pipe(x[:1].clamp(-1, 1), task="colorization", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 16, 16)


STOCK = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1)
KINDS = {
    "plain": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "ddpm": dict(  # as google/ddpm-cifar10-32 is configured
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    ),
    "adm": dict(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet", upsample_type="resnet",
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, in_channels=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_unet2d_there_and_back(tmp_path, kind):
    torch.manual_seed(0)
    stock = UNet2DModel(**STOCK | KINDS[kind]).eval()
    stock.save_pretrained(tmp_path / "stock" / "unet")
    DDPMScheduler(beta_end=0.015, prediction_type="v_prediction").save_pretrained(tmp_path / "stock" / "scheduler")
    convert(tmp_path / "stock", tmp_path / "ours")
    pipe, (y, x) = load(tmp_path / "ours"), inputs()
    t = torch.tensor(TIMESTEPS)
    levels = DDPMScheduler(beta_end=0.015).alphas_cumprod[t]
    seen = torch.cat([y, x], dim=1)
    with torch.no_grad():
        expected = stock(seen if stock.config.in_channels == 6 else y, t).sample
        np.testing.assert_allclose(pipe.unet(y, levels, x).sample, expected, atol=1e-5)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        done = run("export", tmp_path / "ours", tmp_path / "back")
        assert done.exit_code == 0, done.output
        back = UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
        np.testing.assert_allclose(back(seen, t).sample, expected, atol=1e-5)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "back" / "scheduler")
    np.testing.assert_allclose(scheduler.alphas_cumprod[t], levels, rtol=1e-6)
    assert scheduler.config.prediction_type == "v_prediction"


def test_export_says_what_it_cannot(tmp_path):
    for options, says in (
        (dict(patch_size=2), "patch_size is 2"),
        (dict(condition_skip=0.2, hole_skip=0.5), "condition_skip is 0.2"),
        (dict(), "noise_embedding_type is 'logsnr'"),
    ):
        PalettePipeline(toy_unet(**options), PaletteScheduler()).save_pretrained(tmp_path / "pipe")
        with pytest.raises(ValueError, match=says):
            export(tmp_path / "pipe", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_what_is_refused(tmp_path, monkeypatch):
    """In one line with exit code 2, nothing run and nothing written."""
    monkeypatch.chdir(tmp_path)
    layout = original("adm")[0]["layout"]
    state = fill(layout)
    torch.save({"weights": Evil()}, "evil.pt")
    torch.save({"epoch": 3}, "numbers.pt")
    torch.save(state | {"extra.0.weight": torch.zeros(1)}, "extra.pt")
    torch.save({name: value for name, value in state.items() if name != "out.2.bias"}, "missing.pt")
    torch.save({"denoise_fn.time_mlp.1.weight": torch.zeros(4, 4)}, "ddpm.pth")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    Path("broken.pt").write_bytes(b"no pickle")
    toy_unet().save_pretrained("ours")
    UNet2DModel(**STOCK | KINDS["plain"] | dict(num_class_embeds=3)).save_pretrained("labels")
    UNet2DModel(**STOCK | KINDS["plain"]).save_pretrained("stock")
    torch.save(state, "adm.pt")
    before = sorted(Path().iterdir())
    for name, says in (
        ("evil.pt", "is not run"),
        ("numbers.pt", "expected a dictionary of tensors"),
        ("extra.pt", "extra.0.weight has no place"),
        ("missing.pt", "lacks 'conv_out.bias'"),
        ("ddpm.pth", "told no continuous noise level"),
        ("other.safetensors", "it begins with a"),
        ("broken.pt", "is not run"),
        ("ours", "PaletteUNet2DModel, expected a UNet2DModel"),
        ("labels", "num_class_embeds is 3"),
        ("nothing.pt", "does not exist"),
    ):
        done = run("convert", name, "out", "--head-channels", 16)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and says in done.stderr, (name, done.output)
    Path("list.json").write_text("[]")
    for arguments, says in (
        (["ddpm.pth", "out", "--config", "list.json"], "no configuration of Janspiry's"),
        (["stock", "ours"], "not empty"),
        (["stock", "out", "--task", "painting"], "task is 'painting'"),
        (["adm.pt", "out", "--label", 3], "conditioned on no classes"),
        (["adm.pt", "out", "--head-channels", 48], "no multiple of the 48"),
    ):
        done = run("convert", *arguments)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and says in done.stderr, (arguments, done.output)
    assert sorted(Path().iterdir()) == sorted([*before, Path("list.json")])
