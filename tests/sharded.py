"""train_palette.py under FSDP 2 on CPUs: Accelerate divides weights over accelerators only, so that it is told so here,
once its processes have met; how, is the configuration file's word."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from palette_diffusers import PaletteUNet2DModel, sharding, training

shards, levels, original = [], [], sharding.whole
embed = PaletteUNet2DModel.embed_noise_level


def counted(value, keep=True):
    if isinstance(value, DTensor):
        shards.append(value.to_local().numel() / value.numel())
    return original(value, keep)


def noted(self, gamma):
    levels.append(gamma)
    return embed(self, gamma)


Accelerator()
plugin = FullyShardedDataParallelPlugin()
assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
if AcceleratorState().mixed_precision != "no":
    plugin.set_mixed_precision(AcceleratorState().mixed_precision)  # as Accelerate does where it divides
for state in (PartialState, AcceleratorState):
    state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
sharding.whole = training.whole = counted
PaletteUNet2DModel.embed_noise_level = noted
training.train(training.parse())
levels = torch.cat(levels)
assert not torch.equal(levels, levels.bfloat16().float())
assert shards and sum(shards) / len(shards) < 0.75
