"""What a network holds while it samples, and what int8 does to it:  python benchmarks/network.py [--output FILE]

memory: bytes of the weights and of all tensors that live at once during an evaluation, as its operators make and drop
them, over weights and the largest pair of a layer's input and output; what an operator works in is not counted.
int8: torchao's weight-only and dynamic quantisation of the linear layers (diffusers' `TorchAoConfig`), and every
layer's weights rounded to 8 bits a channel: milliseconds of an evaluation, PSNR of a sampled picture against float32.
"""

import argparse
import copy
import json
import weakref
from typing import Any

import torch
from peers import interleaved, machine, our_network, output_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palette_diffusers import PalettePipeline, PaletteUNet2DModel
from palette_diffusers.optimize import _given, _picture, _psnr
from palette_diffusers.pipeline import STARTER


class Living(TorchDispatchMode):
    """Bytes of the tensors that operators made and that still live, now and at most; `known` are not counted."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def inputs(unet: PaletteUNet2DModel, batch: int, size: int = 64) -> tuple[torch.Tensor, float, torch.Tensor]:
    return torch.randn(batch, 3, size, size), 0.5, torch.randn(batch, 3 + bool(unet.config.hole_skip), size, size)


@torch.no_grad()
def living(unet: PaletteUNet2DModel, batch: int) -> dict:
    pairs = []

    def pair(layer: torch.nn.Module, given: tuple, out: Any) -> None:
        if next(layer.children(), None) is None:
            pairs.append(sum(x.nbytes for x in (*given, out) if isinstance(x, torch.Tensor)))

    hooks = [layer.register_forward_hook(pair) for layer in unet.modules()]
    given = inputs(unet, batch)
    with Living([*unet.parameters(), *unet.buffers(), given[0], given[2]]) as found:
        unet(*given, return_dict=False)
    for hook in hooks:
        hook.remove()
    weights = sum(x.nbytes for x in unet.parameters())
    sizes = {"weights": weights, "largest pair": max(pairs), "living": found.most}
    ratio = (weights + found.most) / (weights + max(pairs))
    return {k: round(v / 2**20, 1) for k, v in sizes.items()} | {"ratio": round(ratio, 2)}


def memory(rounds: int) -> list[dict]:
    rows = []
    for name, network, batches in (
        ("starter", PalettePipeline.from_pretrained().unet, (1, 16)),
        ("100M parameters", our_network("64 pixels, 128 wide").eval(), (1, 4)),
    ):
        for batch in batches:
            rows.append({"network": name, "batch": batch} | living(network.bfloat16(), batch))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def rounded(unet: PaletteUNet2DModel) -> PaletteUNet2DModel:
    """Weights of convolutions and linear layers, to 255 levels a channel."""
    unet = copy.deepcopy(unet)
    with torch.no_grad():
        for layer in unet.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                rows = layer.weight.flatten(1).float()
                step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
                layer.weight.copy_(((rows / step).round() * step).reshape(layer.weight.shape))
    return unet


def int8(rounds: int) -> dict:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    def loaded(config: Any = None) -> PaletteUNet2DModel:
        return PaletteUNet2DModel.from_pretrained(
            STARTER, subfolder="unet", variant="fp16", dtype=torch.bfloat16,
            quantization_config=config and TorchAoConfig(config),
        )  # fmt: skip

    pipe = PalettePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    given = _given(64, pipe.unet.device)
    reference = _picture(pipe, pipe.unet, given)
    networks = {
        "bfloat16": loaded(),
        "int8 weights of linear layers": loaded(Int8WeightOnlyConfig()),
        "the same, activations too": loaded(Int8DynamicActivationInt8WeightConfig()),
        "all weights rounded to int8": rounded(pipe.unet).bfloat16(),
    }
    linear = sum(x.weight.numel() for x in pipe.unet.modules() if isinstance(x, torch.nn.Linear))
    out: dict[str, Any] = {
        "linear layers' share of the parameters": round(linear / sum(x.numel() for x in pipe.unet.parameters()), 3),
        "PSNR": {name: round(_psnr(_picture(pipe, one, given), reference), 1) for name, one in networks.items()},
    }
    for batch in (1, 16):
        some = inputs(pipe.unet, batch)
        calls = {name: lambda network=network, some=some: network(*some) for name, network in networks.items()}
        with torch.no_grad():
            times = interleaved(calls, rounds)
        out[f"ms at batch {batch}"] = {name: round(1e3 * seconds, 1) for name, (seconds, _) in times.items()}
    print(json.dumps(out), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="memory,int8", help="which parts, comma-separated; int8 needs torchao 0.18")
    parser.add_argument("--output", type=output_file, default=None, help="JSON file")
    args = parser.parse_args()
    parts = {"memory": memory, "int8": int8}
    if unknown := set(args.only.split(",")) - set(parts):
        parser.error(f"--only has {', '.join(sorted(unknown))}, expected some of {', '.join(parts)}")
    result = {"machine": machine()} | {name: parts[name](args.rounds) for name in args.only.split(",")}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
