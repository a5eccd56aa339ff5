import copy

import pytest
import torch
from torch import nn

from palette_diffusers import norms
from palette_diffusers.norms import ChannelsLastGroupNorm, use_channels_last_norms


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 6e-3)]
)
@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (3, 32, 64, 40)])
def test_gradients_are_those_of_float64(shape, dtype, limit, monkeypatch):
    norm = nn.GroupNorm(8, shape[1], dtype=torch.promote_types(dtype, torch.float32))
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()
    use_channels_last_norms(norm)
    calls, original = [], norms._GroupNorm.apply
    monkeypatch.setattr(norms._GroupNorm, "apply", lambda *args: calls.append(1) or original(*args))
    x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(shape).to(dtype)
    here, there = x.clone().requires_grad_(), x.double().requires_grad_()
    out = norm(here)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.backward(dy), exact(there).backward(dy.double())
    for found, right in zip([here, *norm.parameters()], [there, *exact.parameters()], strict=True):
        assert (found.grad.double() - right.grad).norm() < limit * right.grad.norm()
    assert len(calls) == 1 and here.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "faster"), [(24, True), (64, False)])
def test_small_images_in_half_precision_are_normalized_in_float32(channels, faster):
    norm = nn.GroupNorm(4, channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    exact, plain = copy.deepcopy(norm).bfloat16().double(), copy.deepcopy(norm).bfloat16()
    norm.bfloat16(), use_channels_last_norms(norm)
    x = torch.randn(2, channels, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out, right = norm(x), exact(x.double())
        assert (out.double() - right).norm() < 3e-3 * right.norm()
        wide = nn.functional.group_norm(x.float(), 4, norm.weight.float(), norm.bias.float()).bfloat16()
        assert torch.equal(out, wide if faster else plain(x))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(norm(x), plain(x))  # torch's own where there are gradients


def test_elsewhere_it_is_torchs():
    network = nn.Sequential(nn.GroupNorm(4, 32), nn.GroupNorm(4, 32, affine=False))
    plain = copy.deepcopy(network)
    use_channels_last_norms(network)
    assert [type(layer) for layer in network] == [ChannelsLastGroupNorm, nn.GroupNorm] and repr(network) == repr(plain)
    for x in (torch.randn(2, 32, 64, 64), torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(network(x), plain(x)) and "_GroupNorm" not in type(network[0](x).grad_fn).__name__
    assert network(torch.randn(0, 32, 64, 64).contiguous(memory_format=torch.channels_last)).shape == (0, 32, 64, 64)
    with torch.no_grad():
        assert network(x.repeat(1, 1, 8, 8)).grad_fn is None
