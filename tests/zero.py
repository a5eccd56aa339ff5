"""train_palette.py under DeepSpeed on CPUs: Accelerate starts it on accelerators only, so that it is told so here, once
its processes have met; how, is the configuration file's word."""

import importlib

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from palette_diffusers import PaletteUNet2DModel, training, zero

sizes, levels = [], []
gathered, embed = zero.optimizer_state, PaletteUNet2DModel.embed_noise_level


def counted(optimizer, parameters, keep=True):
    base = zero._base(optimizer)
    mine = sum(state["exp_avg"].numel() for state in base.state.values())
    sizes.append(mine / sum(p.numel() for p in parameters))
    return gathered(optimizer, parameters, keep)


def noted(self, gamma):
    levels.append(gamma)
    return embed(self, gamma)


# gloo does; what DeepSpeed has of its own for one machine takes a minute to compile
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
Accelerator()
plugin = DeepSpeedPlugin()
assert plugin.zero_stage == 2
plugin.set_mixed_precision(AcceleratorState().mixed_precision)  # as Accelerate does
plugin.select(_from_accelerator_state=True)
PartialState._shared_state |= {"distributed_type": DistributedType.DEEPSPEED}
AcceleratorState._shared_state |= {
    "distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugins": {"default": plugin}
}  # fmt: skip
training.optimizer_state = counted
PaletteUNet2DModel.embed_noise_level = noted
training.train(training.parse())
levels = torch.cat(levels)
assert not torch.equal(levels, levels.bfloat16().float())
assert 0.5 <= max(sizes) < 0.75
