"""The U-Net of Janspiry's SR3 (and of its Palette, as module `sr3`) => our configuration, and its weights by our names.

Its blocks are DDPM's, but the noise level enters them linearly, where ours applies SiLU first. As
SiLU(t) - SiLU(-t) = t, an embedding that holds t and -t, and weights W and -W, give the same: no approximation.
"""

from typing import Any

import torch

State = dict[str, torch.Tensor]

PARTS = {
    "res_block.block1.block.0": "resnets.{}.norm1", "res_block.block1.block.3": "resnets.{}.conv1",
    "res_block.noise_func.noise_func.0": "resnets.{}.time_emb_proj",
    "res_block.block2.block.0": "resnets.{}.norm2", "res_block.block2.block.3": "resnets.{}.conv2",
    "res_block.res_conv": "resnets.{}.conv_shortcut", "attn.norm": "attentions.{}.group_norm",
    "attn.qkv": "attentions.{}.qkv", "attn.out": "attentions.{}.to_out.0",
}  # fmt: skip
ENDS = {
    "noise_level_mlp.1": "time_embedding.linear_1", "noise_level_mlp.3": "time_embedding.linear_2",
    "downs.0": "conv_in", "final_conv.block.0": "conv_norm_out", "final_conv.block.3": "conv_out",
}  # fmt: skip


def sr3_layout(state: State) -> tuple[dict[str, Any], State]:
    """Names as in the module `UNet` => (configuration, weights).

    Raises:
        ValueError: weights that have no place; the message names one.
    """
    places, levels = _places(state)
    weights: State = {}
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        if place not in places:
            raise ValueError(f"{name} has no place in the network")
        weights |= _translated(places[place], kind, value)
    widths = [weights[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)]
    attended = [f"down_blocks.{i}.attentions.0.to_q.weight" in weights for i in range(levels)]
    config = dict(
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if yes else "DownBlock2D" for yes in attended],
        up_block_types=["AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)],
        layers_per_block=sum(name.startswith("down_blocks.0.resnets.") and "conv1.weight" in name for name in weights),
        out_channels=weights["conv_out.weight"].shape[0],
        attention_head_dim=None,
        resample_type="conv",
        resnet_time_scale_shift="default",
        flip_sin_to_cos=False,
    )
    return config, weights


def _places(state: State) -> tuple[dict[str, str], int]:
    """Their modules => ours, and the number of levels."""
    places, levels = dict(ENDS), 1
    for side, ours, sampler in (("downs", "down_blocks", "downsamplers"), ("ups", "up_blocks", "upsamplers")):
        level = block = 0
        for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{side}."))):
            if f"{side}.{i}.conv.weight" in state:
                places[f"{side}.{i}.conv"] = f"{ours}.{level}.{sampler}.0.conv"
                level, block = level + 1, 0
            elif f"{side}.{i}.res_block.block1.block.0.weight" in state:
                places |= {f"{side}.{i}.{part}": f"{ours}.{level}.{to.format(block)}" for part, to in PARTS.items()}
                block += 1
        levels = level + 1
    for i in range(2):
        places |= {f"mid.{i}.{part}": f"mid_block.{to.format(i)}" for part, to in PARTS.items()}
    return places, levels


def _translated(target: str, kind: str, value: torch.Tensor) -> State:
    """One weight or bias => ours of the same meaning."""
    module, _, last = target.rpartition(".")
    if last == "qkv":  # without a bias
        parts = dict(zip(("to_q", "to_k", "to_v"), value.flatten(1).chunk(3), strict=True))
        zeros = {f"{module}.{to}.bias": torch.zeros(len(part)) for to, part in parts.items()}
        return zeros | {f"{module}.{to}.weight": part for to, part in parts.items()}
    if last == "linear_2":  # t => t, -t and zeros, as many as the network's embedding is wide
        value = torch.cat([value, -value, torch.zeros_like(value), torch.zeros_like(value)])
    elif last == "time_emb_proj" and kind == "weight":
        value = torch.cat([value, -value, torch.zeros_like(value), torch.zeros_like(value)], dim=1)
    elif target.endswith("to_out.0") and kind == "weight":  # a convolution of width 1
        value = value.flatten(1)
    return {f"{target}.{kind}": value}
