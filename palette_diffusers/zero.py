"""DeepSpeed's ZeRO, stages 1 and 2: every process has the weights, in float32, and a part of the optimizer's state. In
files that state is whole, as torch's own optimizers write it: a run goes on however it is divided."""

from collections.abc import Iterator
from typing import Any

import torch

STEP = "step"


def configure(plugin: Any, precision: str, micro_batch: int, accumulate: int, clip: float) -> None:
    """Fills in Accelerate's plugin what the settings say.

    Computes in lower precision by autocast, as elsewhere: DeepSpeed's own "bf16" would round the weights, and with them
    their moving average, noise levels and pictures.

    Raises:
        ValueError: a stage, precision or offload that does not work here.

    Source: Rajbhandari et al. 2020, section 5.
    """
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(f"DeepSpeed is configured for ZeRO stage {stage}, expected 1 or 2; to divide weights: FSDP 2")
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision is {precision} under DeepSpeed, expected bf16 or no")
    place = (zero.get("offload_optimizer") or {}).get("device", "none")
    if place != "none":
        raise ValueError(f"DeepSpeed is configured to offload the optimizer to {place}, expected none")
    config["fp16"], config["bf16"] = {"enabled": False}, {"enabled": False}
    # without modules that are safe in lower precision, gradients are summed in float32
    low = {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["torch_autocast"] = low
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulate
    config["gradient_clipping"] = clip


def precision_of(accelerator: Any) -> str:
    """What a prepared run computes in: Accelerate's word, but for DeepSpeed, where autocast is `configure`'s."""
    plugin = accelerator.state.deepspeed_plugin
    lowered = plugin is not None and plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
    return "bf16" if lowered else accelerator.mixed_precision


def autocast(accelerator: Any) -> Any:
    """For what is computed outside of the prepared network: Accelerate's, but for DeepSpeed's, which is within it."""
    if accelerator.state.deepspeed_plugin is None or precision_of(accelerator) == "no":
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, torch.bfloat16)


def gradient_norm(engine: Any) -> float:
    """Of the step just taken; nan where DeepSpeed writes -1, which is for what is not finite."""
    norm = float(engine.get_global_grad_norm())
    return norm if norm >= 0 else float("nan")


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _parts(base: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Iterator[tuple[dict, slice, slice]]:
    """What this process steps of a parameter: its group, where in the group's one flat tensor, and where in the
    flattened parameter."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        inside, of = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield (
            base.param_groups[mapping.param_group_index],
            slice(inside.start, inside.start + inside.numel),
            slice(of.start, of.start + of.numel),
        )


def optimizer_state(optimizer: Any, parameters: list[torch.nn.Parameter], keep: bool = True) -> dict:
    """The whole state dict of a prepared optimizer of these parameters, on the CPU; without states in a process that
    doesn't keep them. Every process has to call it."""
    base = _base(optimizer)
    first: dict = next(iter(base.state.values()), {})
    names = [name for name, value in first.items() if torch.is_tensor(value) and value.dim()]
    states: dict[int, dict] = {}
    for index, parameter in enumerate(parameters):
        entries = {}
        for name in names:
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            for group, inside, of in _parts(base, parameter):
                whole[of] = base.state[group["params"][0]][name][inside]
            torch.distributed.all_reduce(whole)
            entries[name] = whole.view(parameter.shape).cpu()
        if keep and names:
            states[index] = {STEP: torch.as_tensor(first[STEP], dtype=torch.float32).cpu().clone(), **entries}
    settings = {key: value for key, value in base.param_groups[0].items() if key != "params"}
    return {"state": states, "param_groups": [settings | {"params": list(range(len(parameters)))}]}


def load_optimizer_state(optimizer: Any, parameters: list[torch.nn.Parameter], state: dict) -> None:
    """Puts the state dict of a torch optimizer of these parameters into a prepared one."""
    base = _base(optimizer)
    for index, entries in state["state"].items():
        for group, inside, of in _parts(base, parameters[index]):
            flat = group["params"][0]
            mine = base.state[flat]
            # where torch's own load_state_dict puts it
            beside = flat.device if group.get("fused") or group.get("capturable") else "cpu"
            mine[STEP] = torch.as_tensor(entries[STEP], dtype=torch.float32).to(beside, copy=True)
            for name, value in entries.items():
                if torch.is_tensor(value) and value.dim():
                    if name not in mine:
                        mine[name] = torch.zeros_like(flat)
                    mine[name][inside] = value.flatten()[of].to(flat.device)
