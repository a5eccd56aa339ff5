"""Residual blocks of fewer passes over memory, for a GPU in half precision and channels-last layout.

A GPU multiplies faster than it reads. Between two convolutions, diffusers' block reads and writes the image for each of
bias, group norm (in float32, and in the plain layout), scale, shift, activation and cast. Here the sums of each channel
are read off in one pass, everything up to the next convolution is one factor and one summand a channel, and the
convolutions' own biases go into that or into the residual sum: one more pass. Written in plain torch; on a GPU
`torch.compile` makes kernels of it, which takes half a minute, once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .unet import SamplerBlock2D

Tensors = tuple[torch.Tensor, ...]


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    offset: torch.Tensor | None,
    groups: int,
    eps: float,
    act: bool,
) -> Tensors:
    """x (B, H, W, C) => act(norm(x + offset) (1 + scale) + shift), and the factor, summand, mean of each channel and
    mean and reciprocal deviation of each group that its backward pass needs, (B, C)."""
    count, height, width, channels = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # over rows first: sums that are short, and many
    mean, square = (t.sum(2).sum(1) / (height * width) for t in (wide, wide * wide))
    away = torch.zeros_like(mean) if offset is None else offset.to(mean.dtype)
    square = square + 2 * away * mean + away * away

    # of each group, given back to its channels
    size = channels // groups
    centre, power = ((t.view(count, groups, size)).mean(2, keepdim=True) for t in (mean + away, square))
    rstd = torch.rsqrt((power - centre * centre).clamp_min(0) + eps)
    centre, rstd = (t.expand(count, groups, size).reshape(count, channels) for t in (centre, rstd))

    factor = rstd * weight
    summand = bias + (away - centre) * factor
    if scale is not None and shift is not None:
        factor, summand = factor * (1 + scale), summand * (1 + scale) + shift
    y = wide * factor[:, None, None] + summand[:, None, None]
    y = y * torch.sigmoid(y) if act else y
    return y.to(x.dtype), factor, summand, mean, away - centre, rstd


def _of_act(x: torch.Tensor, dy: torch.Tensor, factor: torch.Tensor, summand: torch.Tensor, act: bool) -> Tensors:
    """x, and the gradient before the activation, in the precision of sums."""
    wide, dz = x.to(factor.dtype), dy.to(factor.dtype)
    if act:
        z = wide * factor[:, None, None] + summand[:, None, None]
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return wide, dz


def _norm_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    factor: torch.Tensor,
    summand: torch.Tensor,
    mean: torch.Tensor,
    away: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    act: bool,
) -> Tensors:
    """Gradients of weight, bias, scale, shift and offset, and what `_norm_dx` adds: a slope on x, and a level."""
    count, height, width, channels = x.shape
    wide, dz = _of_act(x, dy, factor, summand, act)
    of_dz, of_product = (t.sum(2).sum(1) for t in (dz, dz * wide))
    of_normal = rstd * (of_product + away * of_dz)  # of dz times the normalized x

    gain = weight if scale is None else weight * (1 + scale)
    size = channels // groups
    n = height * width * size
    a, b = ((gain * t).view(count, groups, size).sum(2, keepdim=True) / n for t in (of_dz, of_normal))
    a, b = (t.expand(count, groups, size).reshape(count, channels) for t in (a, b))
    slope = -rstd * rstd * b
    level = slope * away - rstd * a
    doffset = of_dz * factor + (mean * slope + level) * (height * width)
    one = 1.0 if scale is None else 1 + scale
    dweight, dbias = (one * of_normal).sum(0), (one * of_dz).sum(0)
    return dweight, dbias, weight * of_normal + bias * of_dz, of_dz, doffset, slope, level


def _norm_dx(
    dy: torch.Tensor,
    x: torch.Tensor,
    factor: torch.Tensor,
    summand: torch.Tensor,
    slope: torch.Tensor,
    level: torch.Tensor,
    act: bool,
) -> torch.Tensor:
    wide, dz = _of_act(x, dy, factor, summand, act)
    return (dz * factor[:, None, None] + wide * slope[:, None, None] + level[:, None, None]).to(x.dtype)


def _add(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (x + y + bias).to(y.dtype)


@cache
def _kernel(function: Callable, device: str) -> Callable:
    """On a GPU, compiled for all shapes at once."""
    if device != "cuda":
        return function
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 256)
    return torch.compile(function, dynamic=True)


def _call(function: Callable, x: torch.Tensor, *args: Any) -> Any:
    """Without what a compiled function would be compiled anew for: autocast, and gradients."""
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in (x, *args)]
    # sizes that happen to be equal once need not be so again
    with torch.autocast(x.device.type, enabled=False), torch.fx.experimental._config.patch(use_duck_shape=False):
        return _kernel(function, x.device.type)(*plain)


class _Norm(torch.autograd.Function):
    """`_norm` of (B, C, H, W), which takes the same arguments."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *given: Any) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).contiguous()
        y, *rest = _call(_norm, rows, *given)
        weight, bias, scale, _, offset, groups, _, act = given
        ctx.save_for_backward(rows, weight, bias, scale, *rest)
        ctx.settings = groups, act
        ctx.offset = offset is not None
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, scale, *rest = ctx.saved_tensors
        dy = dy.permute(0, 2, 3, 1).contiguous()
        found = _call(_norm_sums, dy, x, weight, bias, scale, *rest, *ctx.settings)
        dweight, dbias, dscale, dshift, doffset, slope, level = found
        dx = _call(_norm_dx, dy, x, *rest[:2], slope, level, ctx.settings[1])
        given = [dscale, dshift] if scale is not None else [None, None]
        return (
            dx.permute(0, 3, 1, 2), dweight.to(weight.dtype), dbias.to(bias.dtype),
            *(t if t is None else t.to(scale.dtype) for t in given), doffset if ctx.offset else None, None, None, None,
        )  # fmt: skip


class _Add(torch.autograd.Function):
    """x + y + bias, of (B, C, H, W) and (C,)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.dtypes = x.dtype, bias.dtype
        x, y = (t.permute(0, 2, 3, 1).contiguous() for t in (x, y))
        return _call(_add, x, y, bias).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        of_x, of_bias = ctx.dtypes
        wide = torch.promote_types(dy.dtype, torch.float32)
        return dy.to(of_x), dy, dy.sum((0, 2, 3), dtype=wide).to(of_bias)


def norm_act(
    x: torch.Tensor,
    norm: nn.GroupNorm,
    act: bool = True,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(norm(x + offset) (1 + scale) + shift), without silu where `act` is False, in x's precision and channels-last
    layout; sums are in float32. x is (B, C, H, W), the others (B, C).

    Raises:
        ValueError: one of `scale` and `shift` without the other.
    """
    if (scale is None) != (shift is None):
        raise ValueError(f"scale is {scale if scale is None else 'given'}, expected it with shift, or neither")
    return _Norm.apply(x, norm.weight, norm.bias, scale, shift, offset, norm.num_groups, norm.eps, act)


def _half(x: torch.Tensor) -> bool:
    """Whether a convolution of x would be in half precision."""
    return x.dtype in (torch.bfloat16, torch.float16)


def _convolve(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """Without its bias."""
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class FusedGroupNorm(nn.GroupNorm):
    """As torch's; in half precision it stays in that, and in channels-last layout."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return norm_act(input, self, act=False) if _half(input) and input.dim() == 4 else super().forward(input)


class FusedResnetBlock2D(ResnetBlock2D):
    """As diffusers'; in half precision in fewer passes. With layers that are no plain ones (adapters, say) and in
    float32 it is diffusers' own."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        convolutions = [self.conv1, self.conv2, *([] if self.conv_shortcut is None else [self.conv_shortcut])]
        plain = (
            _half(input_tensor)
            and all(type(layer) is nn.Conv2d and layer.bias is not None for layer in convolutions)
            and all(layer.padding_mode == "zeros" for layer in convolutions)
            and isinstance(self.nonlinearity, nn.SiLU)
            and self.output_scale_factor == 1
            and temb is not None
            and self.time_emb_proj is not None
        )
        if not plain:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, hidden = input_tensor, norm_act(input_tensor, self.norm1)
        sample = self.upsample or self.downsample
        if sample is not None:
            if self.upsample is not None and len(hidden) >= 64:  # as in diffusers: torch's kernel fails in this layout
                x, hidden = x.contiguous(), hidden.contiguous()
            x, hidden = sample(x), sample(hidden)
        hidden = _convolve(hidden, self.conv1)
        level = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        offset = self.conv1.bias.expand(len(hidden), -1)
        if self.time_embedding_norm == "scale_shift":
            scale, shift = level.chunk(2, dim=1)
            hidden = norm_act(hidden, self.norm2, True, scale, shift, offset)
        else:
            hidden = norm_act(hidden, self.norm2, offset=offset + level)
        hidden = _convolve(self.dropout(hidden), self.conv2)
        bias = self.conv2.bias
        if self.conv_shortcut is not None:
            x, bias = _convolve(x, self.conv_shortcut), bias + self.conv_shortcut.bias
        return _Add.apply(x, hidden, bias)


class FusedSamplerBlock2D(SamplerBlock2D, FusedResnetBlock2D):
    """The same for blocks that change resolution."""


def use_fused_blocks(network: nn.Module) -> None:
    """Changes the network's residual blocks and attention norms to these, in place; parameters stay the same."""
    kinds = {ResnetBlock2D: FusedResnetBlock2D, SamplerBlock2D: FusedSamplerBlock2D}
    for module in network.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]  # type: ignore[index]
        elif isinstance(module, Attention) and isinstance(module.group_norm, nn.GroupNorm):
            module.group_norm.__class__ = FusedGroupNorm
