"""Checkpoints of other implementations => a pipeline of ours, and ours => a stock UNet2DModel.

Each converter gives (the U-Net, the scheduler, steps); outputs equal the original's to 1e-5 in float32.
"""

import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file

from .convert_sr3 import sr3_layout
from .files import new_folder, occupied
from .pipeline import PalettePipeline
from .scheduler import PaletteScheduler, linear_gammas
from .tasks import get_task
from .unet import PaletteUNet2DModel

State = dict[str, torch.Tensor]
Converted = tuple[PaletteUNet2DModel, PaletteScheduler, int]

# settings of the same name and meaning in a UNet2DModel and in ours
SHARED = (
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
    "norm_num_groups", "norm_eps", "downsample_padding", "resnet_time_scale_shift", "add_attention", "dropout",
    "flip_sin_to_cos", "freq_shift", "out_channels",
)  # fmt: skip
TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")
USUAL = {"n_timestep": 2000, "linear_start": 1e-6, "linear_end": 0.01}  # of Janspiry's training
USUAL_SAMPLING = {"n_timestep": 1000, "linear_start": 1e-4, "linear_end": 0.09}
STOCK_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    config: str | os.PathLike | None = None,
    head_channels: int | None = None,
    new_attention_order: bool = False,
    image_size: int | None = None,
    tasks: Sequence[str] = (),
    ema: bool = True,
    label: int | None = None,
) -> Path:
    """Writes a pipeline's folder, that `PalettePipeline.from_pretrained` loads.

    Args:
        source: Janspiry's `N_Network.pth` (Palette) or `I..._gen.pth` (SR3), guided-diffusion's `.pt`, or a folder of
            diffusers' `UNet2DModel` (or of a pipeline that has one).
        output: a new folder.
        config: Janspiry's JSON: its schedules, heads, norm groups, size and task are taken from there. Without it, the
            training schedule is the one whose levels the file holds; with it, the two must agree.
        head_channels: channels of an attention head, which a checkpoint doesn't tell; 32 (Janspiry) or 64 (ADM).
        new_attention_order: trained with `use_new_attention_order`; a checkpoint doesn't tell it either.
        image_size: pixels a side; 256 if nothing says it.
        tasks: names of the tasks it was trained for; what the configuration says, or all.
        ema: take the average `N_Network_ema.pth` where it lies beside the file.
        label: the class whose embedding is folded in, of a network that is conditioned on classes.

    Raises:
        ValueError: another layout, or one that the network can't express; the message names it.
    """
    source, output = Path(source), Path(output)
    if occupied(output):
        raise ValueError(f"{output} is not empty: name a new folder")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    named: list[str] = []
    try:
        if source.is_dir():
            unet, scheduler, steps = from_unet2d(source)
        else:
            state = read_state(average_beside(source) if ema else source)
            if any(name.startswith("denoise_fn.") for name in state):
                settings = read_config(Path(config)) if config else {}
                named = [settings["task"]] if settings else ["paired"] * is_sr3(state)
                unet, scheduler, steps = from_janspiry(state, settings, head_channels or 32, image_size)
            elif "time_embed.0.weight" in state:
                fold_class(state, label)
                unet, scheduler, steps = from_adm(state, head_channels or 64, new_attention_order, image_size or 256)
            else:
                some = ", ".join(list(state)[:3])
                raise ValueError(f"{source} is neither Janspiry's nor guided-diffusion's U-Net: it begins with {some}")
    except KeyError as error:
        raise ValueError(f"{source} is incomplete: it lacks {error}") from None
    except (IndexError, ZeroDivisionError, TypeError, RuntimeError) as error:  # where weights are read for their shapes
        raise ValueError(f"{source} has weights of shapes or names that no such network has: {error}") from None
    names = list(tasks or named or TASKS)
    for name in names:
        get_task(name)
    pipe = PalettePipeline(unet, scheduler, tasks=names, default_task=names[0], default_steps=steps)
    with new_folder(output) as part:
        pipe.save_pretrained(part)
    return output


# reading


def read_state(path: Path) -> State:
    """A file of weights, by `weights_only` where it is a pickle.

    Raises:
        ValueError: anything but a dictionary of tensors; nothing else of a pickle is run.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no file of weights alone, and is not run: {why}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, expected a dictionary of tensors")
    return {name.removeprefix("module."): value.float() for name, value in state.items()}


def average_beside(path: Path) -> Path:
    """`N_Network.pth` => `N_Network_ema.pth` where there is one."""
    average = path.with_stem(f"{path.stem}_ema")
    return average if average.is_file() else path


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of Janspiry's Palette or SR3, JSON with // comments => task, unet, beta_schedule (train, test)
    and image_size."""
    try:
        model = json.loads(re.sub(r"(?m)//.*$", "", path.read_text()))["model"]
        if "which_model_G" in model:  # SR3, whose source is already as large as its target
            schedules = model["beta_schedule"]
            betas = {"train": schedules["train"], "test": schedules.get("val", schedules["train"])}
            size = model["diffusion"]["image_size"]
            return {"task": "paired", "unet": model["unet"], "beta_schedule": betas, "image_size": size}
        network, unet = model["which_networks"][0]["args"], model["which_networks"][0]["args"]["unet"]
        return {
            "task": model["which_model"]["args"]["task"], "unet": unet,
            "beta_schedule": network.get("beta_schedule", {}), "image_size": unet.get("image_size", 256),
        }  # fmt: skip
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is no configuration of Janspiry's: expected JSON with model.which_networks") from None


def stored_schedule(state: State, settings: dict[str, Any]) -> dict[str, Any]:
    """The linear schedule whose levels Janspiry's networks save beside their weights, {} if they have none.

    Raises:
        ValueError: another than linear, or one that the configuration doesn't have.
    """
    levels = state.get("gammas", state.get("alphas_cumprod"))
    if levels is None:
        return {}
    gammas = levels.double().numpy()
    for given in (*settings.get("beta_schedule", {}).values(), USUAL):
        if _gives(given, gammas):
            return given
    if _gives(USUAL_SAMPLING, gammas):  # saved while it sampled
        return USUAL
    sure = gammas > 1e-30  # below, float32 has no ratio of two
    betas = 1 - gammas[sure] / np.append(1.0, gammas[sure][:-1])
    slope, start = np.polyfit(np.arange(len(betas)), betas, 1) if len(betas) > 1 else (0.0, np.nan)
    ends = (float(f"{x:.3g}") for x in (start, start + slope * (len(gammas) - 1)))  # float32 knows no more
    found = dict(zip(("n_timestep", "linear_start", "linear_end"), (len(gammas), *ends), strict=True))
    if not _gives(found, gammas):
        raise ValueError("the file's own noise levels are of no linear schedule: only that can be converted")
    if settings.get("beta_schedule"):
        raise ValueError(
            f"the file's own noise levels are of {found}, the configuration says {settings['beta_schedule']}: "
            "name the one that it was trained with"
        )
    return found


def _gives(schedule: dict[str, Any], gammas: np.ndarray) -> bool:
    """Whether a configuration's schedule has these levels (T,), to what float32 leaves of them."""
    schedule = USUAL | schedule
    start, end, steps = (schedule[name] for name in ("linear_start", "linear_end", "n_timestep"))
    if steps != len(gammas) or not 0 < start <= end < 1:
        return False
    return np.allclose(linear_gammas(start, end, steps)[1:], gammas, rtol=0.01, atol=1e-6)


def is_sr3(state: State) -> bool:
    """Whether it is of the SR3 repository, which tells its network sqrt(gamma); that of Palette keeps `gammas`."""
    return "sqrt_alphas_cumprod" in state


# the originals


def from_janspiry(state: State, settings: dict[str, Any], head_channels: int, image_size: int | None) -> Converted:
    """Janspiry's Palette (either network) and SR3: gamma or its root is embedded, the source comes first."""
    embedded = "sqrt_gamma" if is_sr3(state) else "gamma"
    stored = stored_schedule(state, settings)
    state = {name.removeprefix("denoise_fn."): value for name, value in state.items() if "denoise_fn." in name}
    options = settings.get("unet", {})
    if "noise_level_mlp.1.weight" in state:
        unet, weights = sr3_layout(state)
        unet["norm_num_groups"] = options.get("norm_groups") or 32
    elif "cond_embed.0.weight" in state:
        unet, weights = adm_layout(state, "cond_embed", *_attention(options, head_channels))
    else:
        raise ValueError("this network of Janspiry's is told no continuous noise level: it can't be converted")
    weight = weights["conv_in.weight"]
    y = unet["out_channels"]
    weights["conv_in.weight"] = torch.cat([weight[:, -y:], weight[:, :-y]], dim=1)
    unet |= dict(
        in_channels=y, condition_channels=weight.shape[1] - y, dropout=options.get("dropout", 0.0),
        sample_size=image_size or settings.get("image_size", 256), noise_embedding_type=embedded,
        noise_embedding_scale=1.0,
    )  # fmt: skip
    betas = settings.get("beta_schedule", {})
    train = USUAL | betas.get("train", stored)
    # beside its usual schedule that repository samples by another; an unusual one is sampled by itself
    usual = USUAL.items() <= train.items() and embedded == "gamma"
    test = (USUAL_SAMPLING if usual else train) | betas.get("test", {})
    for part in (train, test):
        if part.get("schedule", "linear") != "linear":
            raise ValueError(f"the schedule is {part['schedule']!r}, only 'linear' can be converted")
    scheduler = PaletteScheduler(
        num_train_timesteps=train["n_timestep"],
        beta_start=train["linear_start"],
        beta_end=train["linear_end"],
        sampling_timesteps=test["n_timestep"],
        sampling_beta_start=test["linear_start"],
        sampling_beta_end=test["linear_end"],
        sampling_variance="fixed_small",
    )
    return build(unet, weights), scheduler, scheduler.config.sampling_timesteps


def _attention(options: dict[str, Any], head_channels: int) -> tuple[int | None, bool]:
    """Channels of a head (None: one head) and the order of queries, keys and values, by a configuration."""
    if not options:
        return head_channels, False
    heads = options["num_head_channels"] if options.get("num_head_channels", -1) > 0 else None
    if heads is None and options.get("num_heads", 1) != 1:
        raise ValueError(f"num_heads is {options['num_heads']}: heads whose width varies can't be converted")
    return heads, options.get("use_new_attention_order", False)


def fold_class(state: State, label: int | None) -> None:
    """A network that is conditioned on classes becomes that of one class: the class's embedding is added to the noise
    level's, where it is a constant.

    Raises:
        ValueError: classes without a label, or a label without such a class.
    """
    classes = state.pop("label_emb.weight", None)
    if classes is None:
        if label is not None:
            raise ValueError(f"label is {label}, but the network is conditioned on no classes")
        return
    if label is None or not 0 <= label < len(classes):
        raise ValueError(
            f"the network is conditioned on {len(classes)} classes, ours on none: name the one to fold in by label, "
            f"0 to {len(classes) - 1}" + ("" if label is None else f", not {label}")
        )
    state["time_embed.2.bias"] = state["time_embed.2.bias"] + classes[label]


def from_adm(state: State, head_channels: int, new_attention_order: bool, image_size: int) -> Converted:
    """guided-diffusion's U-Net on its linear schedule of 1000 steps; a learned variance is left out. Three channels in
    become six: the source's weights are zero, so that it starts as the prior alone."""
    unet, weights = adm_layout(state, "time_embed", head_channels, new_attention_order)
    outputs = min(3, unet["out_channels"])
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = weights[name][:outputs]
    grow(weights, outputs)
    unet |= dict(out_channels=outputs, in_channels=outputs, condition_channels=outputs, sample_size=image_size)
    unet |= dict(noise_embedding_type="timestep", noise_embedding_scale=1.0)
    scheduler = PaletteScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, sampling_spacing="logsnr",
        sampling_variance="fixed_small",
    )  # fmt: skip
    return build(unet, weights), scheduler, 50


def from_unet2d(folder: Path) -> Converted:
    """diffusers' `UNet2DModel`, with the schedule of the pipeline that it lies in, or of DDPM."""
    home = folder if (folder / "config.json").is_file() else folder / "unet"
    if not (home / "config.json").is_file():
        raise ValueError(f"{folder} has neither config.json nor unet/config.json")
    kind = json.loads((home / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{home} holds a {kind}, expected a UNet2DModel")
    stock = UNet2DModel.from_pretrained(home)
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text()) if path.is_file() else {}
    if schedule.get("beta_schedule", "linear") != "linear" or schedule.get("trained_betas") is not None:
        raise ValueError(f"{path}: only a linear beta schedule can be converted")
    betas = (
        schedule.get("beta_start", 1e-4),
        schedule.get("beta_end", 0.02),
        schedule.get("num_train_timesteps", 1000),
    )
    config, weights = stock.config, dict(stock.state_dict())
    _check_stock(config)
    grow(weights, config.out_channels)
    unet = {name: config[name] for name in SHARED} | dict(
        sample_size=config.sample_size or 256, resample_type=config.downsample_type, in_channels=config.out_channels,
        condition_channels=weights["conv_in.weight"].shape[1] - config.out_channels,
        noise_embedding_type="timestep", noise_embedding_scale=1.0, timestep_betas=betas,
    )  # fmt: skip
    scheduler = PaletteScheduler(
        num_train_timesteps=betas[2], beta_start=betas[0], beta_end=betas[1], sampling_spacing="logsnr",
        sampling_variance="fixed_small", prediction_type=schedule.get("prediction_type", "epsilon"),
    )  # fmt: skip
    return build(unet, weights), scheduler, 50


def _check_stock(config: Any) -> None:
    """What our network has no setting for must have the library's default."""
    for name, expected in (
        ("center_input_sample", (False,)),
        ("time_embedding_type", ("positional",)),
        ("time_embedding_dim", (None, config.block_out_channels[0] * 4)),
        ("mid_block_type", ("UNetMidBlock2D",)),
        ("mid_block_scale_factor", (1,)),
        ("act_fn", ("silu",)),
        ("class_embed_type", (None,)),
        ("num_class_embeds", (None,)),
        ("upsample_type", (config.downsample_type,)),
        ("attn_norm_num_groups", (config.norm_num_groups, *[None] * (config.resnet_time_scale_shift == "default"))),
        ("in_channels", (config.out_channels, config.out_channels * 2)),
    ):
        if config.get(name) not in expected:
            raise ValueError(f"{name} is {config.get(name)!r}, expected {' or '.join(map(repr, expected))}")
    for kind in config.down_block_types:
        if kind not in STOCK_DOWN:
            raise ValueError(f"down_block_types has {kind!r}, expected {', '.join(STOCK_DOWN)}")


# the layout of ADM

PARTS = {
    "": "", "op": "conv", "conv": "conv", "norm": "group_norm", "proj_out": "to_out.0", "in_layers.0": "norm1",
    "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip


def adm_layout(state: State, embedding: str, heads: int | None, new_order: bool) -> tuple[dict[str, Any], State]:
    """The U-Net of Dhariwal & Nichol 2021 by its authors' names => our configuration, and its weights by our names.

    Args:
        embedding: the name of the noise level's layers. heads: channels a head, None for one head.
        new_order: queries, keys and values are apart first, heads second.

    Raises:
        ValueError: weights that have no place; the message names one.
    """
    levels, depth = _levels(state)
    places = _places(levels, depth, embedding)
    weights: State = {}
    for name, value in state.items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        part, _, kind = name[len(place or "") + 1 :].rpartition(".")
        if place is None or (part not in PARTS and part != "qkv"):
            raise ValueError(f"{name} has no place in the network")
        target = places[place]
        if place.startswith("output_blocks") and place.endswith(".1") and part not in ("norm", "qkv", "proj_out"):
            target = re.sub(r"attentions\.\d+", "upsamplers.0", target)
        if part == "qkv":
            for to, piece in zip(("to_q", "to_k", "to_v"), split_qkv(value, heads, new_order), strict=True):
                weights[f"{target}.{to}.{kind}"] = piece
        else:
            value = value.flatten(1) if part == "proj_out" and kind == "weight" else value  # a Conv1d of width 1
            weights[".".join(filter(None, (target, PARTS[part], kind)))] = value
    return _adm_config(weights, levels, depth) | {"attention_head_dim": heads}, weights


def _levels(state: State) -> tuple[int, int]:
    """The number of resolutions, and of residual blocks of each."""
    outputs = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("output_blocks.")), default=0)
    ups = [
        n
        for n in range(outputs)
        if any(
            f"output_blocks.{n}.{k}.{part}" in state for k in (1, 2) for part in ("conv.weight", "in_layers.0.weight")
        )
    ]
    levels = len(ups) + 1
    return levels, outputs // levels - 1


def _places(levels: int, depth: int, embedding: str) -> dict[str, str]:
    """Their modules => ours. An output block's second part may be its upsampling instead of its attention."""
    places = {
        f"{embedding}.0": "time_embedding.linear_1",
        f"{embedding}.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for i in range(levels):
        first = i * (depth + 1)
        for j in range(depth):
            places[f"input_blocks.{first + j + 1}.0"] = f"down_blocks.{i}.resnets.{j}"
            places[f"input_blocks.{first + j + 1}.1"] = f"down_blocks.{i}.attentions.{j}"
        places[f"input_blocks.{first + depth + 1}.0"] = f"down_blocks.{i}.downsamplers.0"
        for j in range(depth + 1):
            places[f"output_blocks.{first + j}.0"] = f"up_blocks.{i}.resnets.{j}"
            places[f"output_blocks.{first + j}.1"] = f"up_blocks.{i}.attentions.{j}"
        places[f"output_blocks.{first + depth}.2"] = f"up_blocks.{i}.upsamplers.0"
    return places


def split_qkv(value: torch.Tensor, heads: int | None, new_order: bool) -> tuple[torch.Tensor, ...]:
    """Weight (3C, C, 1) or bias (3C,) of queries, keys and values in one => three, (C, C) or (C,)."""
    width = value.shape[0] // 3
    value = value.flatten(1) if value.ndim > 1 else value
    if new_order:
        return value.chunk(3)
    if width % (heads or width):
        raise ValueError(f"attention has {width} channels, no multiple of the {heads} of a head")
    apart = value.unflatten(0, (-1, 3, heads or width))  # heads first, then q, k, v
    return tuple(apart[:, k].flatten(0, 1) for k in range(3))


def _adm_config(weights: State, levels: int, depth: int) -> dict[str, Any]:
    """What the weights say of the network."""
    widths = [weights[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)]
    inputs = weights["time_embedding.linear_1.weight"].shape[1]
    if inputs != widths[0]:
        raise ValueError(f"the noise level has {inputs} channels, the first level {widths[0]}: they must be the same")
    attended = [f"down_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    resnet = any("samplers.0.norm1" in name for name in weights)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    embedded = weights["mid_block.resnets.0.time_emb_proj.weight"].shape[0]
    return dict(
        out_channels=weights["conv_out.weight"].shape[0],
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if yes else plain[0] for yes in attended],
        up_block_types=["AttnUpBlock2D" if yes else plain[1] for yes in reversed(attended)],
        layers_per_block=depth,
        resample_type="resnet" if resnet else "conv",
        resnet_time_scale_shift="scale_shift" if embedded == 2 * widths[-1] else "default",
        add_attention="mid_block.attentions.0.to_q.weight" in weights,
    )


def grow(weights: State, channels: int) -> None:
    """A first layer for the noisy image alone gets zeros for the source image."""
    weight = weights["conv_in.weight"]
    if weight.shape[1] == channels:
        weights["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)


def build(config: dict[str, Any], weights: State) -> PaletteUNet2DModel:
    """The network with these weights, all of them."""
    unet = PaletteUNet2DModel(**config)
    surplus = sorted(weights.keys() - unet.state_dict().keys())  # strict loading passes over a block that is None
    if surplus:
        raise ValueError(f"{len(surplus)} weights have no place in the network, {surplus[0]} for one")
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{len(bad)} weights are not finite, {bad[0]} for one")
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights don't fit the network: {' '.join(str(error).split())[:300]}") from None
    return unet.eval()


# ours => stock


def export(source: str | os.PathLike | None, output: str | os.PathLike) -> Path:
    """Writes `unet/` (a stock `UNet2DModel`) and `scheduler/` (a `DDPMScheduler`), for those who use diffusers alone:
    `unet(torch.cat([noisy, source], dim=1), timestep)`.

    Raises:
        ValueError: a network that a `UNet2DModel` can't express; the message names the setting.
    """
    output = Path(output)
    if occupied(output):
        raise ValueError(f"{output} is not empty: name a new folder")
    pipe = PalettePipeline.from_pretrained(source)
    unet, scheduler = to_unet2d(pipe.unet), to_ddpm(pipe)
    with new_folder(output) as part:
        unet.save_pretrained(part / "unet")
        scheduler.save_pretrained(part / "scheduler")
    return output


def to_unet2d(unet: PaletteUNet2DModel) -> UNet2DModel:
    """The same network as a stock `UNet2DModel`, which sees the noisy image and the source as one."""
    config = unet.config
    for name, expected in (
        ("patch_size", 1), ("condition_skip", 0), ("hole_skip", 0), ("noise_embedding_type", "timestep"),
        ("noise_embedding_scale", 1),
    ):  # fmt: skip
        if config[name] != expected:
            raise ValueError(f"{name} is {config[name]!r}; a UNet2DModel can only express {expected!r}")
    stock = UNet2DModel(
        **{name: config[name] for name in SHARED},
        sample_size=config.sample_size,
        in_channels=config.in_channels + config.condition_channels,
        downsample_type=config.resample_type,
        upsample_type=config.resample_type,
        attn_norm_num_groups=config.norm_num_groups,
    )
    stock.load_state_dict(unet.state_dict())
    return stock.eval()


def to_ddpm(pipe: PalettePipeline) -> DDPMScheduler:
    """The ancestral sampler on the steps that the network numbers."""
    beta_start, beta_end, steps = pipe.unet.config.timestep_betas
    return DDPMScheduler(
        num_train_timesteps=int(steps), beta_start=beta_start, beta_end=beta_end, beta_schedule="linear",
        prediction_type=pipe.scheduler.config.prediction_type, clip_sample=True, timestep_spacing="trailing",
    )  # fmt: skip
