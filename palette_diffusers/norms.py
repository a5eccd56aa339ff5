"""Group norm in channels-last layout on a CPU, which torch computes several times as slowly as in the plain layout: its
backward pass, a seventh of a training step in bfloat16; and in half precision small images whose groups are no whole
vectors, a quarter of the starter's evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .machine import best_layout

FEW, VECTOR = 1 << 10, 16  # pixels, and channels a group, below which float32 is faster than half precision
LEAST = 1 << 16  # numbers an image, below which torch's own is as fast


class _GroupNorm(torch.autograd.Function):
    """Of (B, C, H, W), channels last. Sums are in float32 at least, products in the input's precision."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        count, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, count, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        (count, groups), channels = mean.shape, x.shape[1]
        dy, flat = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (dy, x))  # (B, H*W, C)

        # sums over each channel, then over each group: (B, G, C/G), (B, G, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        of_product = (dy * flat).sum(1, dtype=wide).unflatten(1, (groups, -1))
        of_dy = dy.sum(1, dtype=wide).unflatten(1, (groups, -1))
        mean, rstd, scale = mean.to(wide)[..., None], rstd.to(wide)[..., None], weight.to(wide).view(1, groups, -1)
        a, b = ((part * scale).sum(2, keepdim=True) for part in (of_product, of_dy))

        # dx = rstd weight dy - rstd^3 (a - b mean) (x - mean) / n - rstd b / n
        n = flat.shape[1] * channels // groups
        slope = (b * mean - a) * rstd**3 / n
        offset = -slope * mean - b * rstd / n
        factors = [(t.expand_as(of_dy).reshape(count, 1, channels)).to(x.dtype) for t in (offset, slope, rstd * scale)]
        dx = torch.addcmul(torch.addcmul(factors[0], flat, factors[1]), dy, factors[2])
        dx = dx.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        dweight = ((of_product - mean * of_dy) * rstd).sum(0).view(channels)
        return dx, dweight.to(weight.dtype), of_dy.sum(0).view(channels).to(weight.dtype), None, None


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A group norm that is faster in channels-last layout on a CPU; everywhere else it is torch's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        here = (
            not torch.compiler.is_compiling()
            and input.device.type == "cpu"
            and input.dim() == 4
            and input.shape[0] > 0
            and self.bias is not None
            and input.is_contiguous(memory_format=torch.channels_last)
        )
        if here and torch.is_grad_enabled() and input.shape[1:].numel() >= LEAST:
            return _GroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        half = input.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled()
        if here and half and input.shape[2:].numel() < FEW and self.num_channels // self.num_groups % VECTOR:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)
        return super().forward(input)

    def _get_name(self) -> str:
        return "GroupNorm"


def lay_out(network: nn.Module, device: str) -> None:
    """In the layout that computes fastest on this device (`machine.best_layout`), in place."""
    network.to(memory_format=best_layout(device))
    use_channels_last_norms(network)


def use_channels_last_norms(network: nn.Module) -> None:
    """Changes the network's group norms to `ChannelsLastGroupNorm`, in place; parameters stay the same tensors."""
    for module in network.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = ChannelsLastGroupNorm
