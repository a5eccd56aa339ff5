"""Weights that are divided over processes (FSDP 2), whole in every file: a run goes on however it is divided."""

from typing import Any

import torch


def whole(value: Any, keep: bool = True) -> Any:
    """Shards in dicts and lists => the tensors that they are of, on the CPU; None in a process that doesn't keep them.
    Every process has to call it. What is not divided stays as it is."""
    if isinstance(value, dict):
        return {key: whole(part, keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(part, keep) for part in value)
    if not hasattr(value, "full_tensor"):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def share(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, divided as a parameter of its shape is; as it is where that isn't divided."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def share_optimizer(state: dict, parameters: list[torch.nn.Parameter]) -> dict:
    """As `share`, for the state dict of an optimizer of these parameters."""
    shares = {
        index: {name: share(v, parameters[index]) if torch.is_tensor(v) else v for name, v in entries.items()}
        for index, entries in state["state"].items()
    }
    return state | {"state": shares}
