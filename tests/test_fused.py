import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from palette_diffusers import PaletteUNet2DModel, fused
from palette_diffusers.fused import FusedGroupNorm, FusedResnetBlock2D, FusedSamplerBlock2D, norm_act, use_fused_blocks

ADM = dict(
    block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=32,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)  # fmt: skip


def plain(x, norm, act, scale, shift, offset):
    """The same, pass by pass."""
    x = x if offset is None else x + offset[:, :, None, None]
    x = norm(x)
    x = x if scale is None else x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return nn.functional.silu(x) if act else x


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("given", ["scale, shift, offset", "scale, shift", "offset", ""])
def test_values_and_gradients_are_those_of_single_passes(act, given):
    norm = nn.GroupNorm(4, 16).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    x = (torch.randn(3, 16, 5, 6, dtype=torch.double) + 1).requires_grad_()
    numbers = {name: torch.randn(3, 16, dtype=torch.double, requires_grad=True) for name in given.split(", ") if name}
    scale, shift, offset = map(numbers.get, ("scale", "shift", "offset"))
    found, right = norm_act(x, norm, act, scale, shift, offset), plain(x, norm, act, scale, shift, offset)
    torch.testing.assert_close(found, right)
    dy, of = torch.randn_like(found), [x, *norm.parameters(), *numbers.values()]
    torch.testing.assert_close(torch.autograd.grad(found, of, dy), torch.autograd.grad(right, of, dy))


def network(**options):
    torch.manual_seed(0)
    unet = PaletteUNet2DModel(32, **(ADM | options)).train()
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    return unet


def run(unet, dtype=torch.float32, half=False):
    """The output, and all gradients in one."""
    torch.manual_seed(1)
    y, x = torch.randn(2, 2, 3, 32, 32).to(dtype).unbind()
    unet.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = unet(y, torch.tensor([0.3, 0.9]), x).sample
    out.double().square().mean().backward()
    return out.detach().double(), torch.cat([p.grad.flatten().double() for p in unet.parameters()])


def errors(found, right):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


@pytest.mark.parametrize("options", [{}, dict(resnet_time_scale_shift="default"), dict(add_attention=False)])
def test_a_network_in_bfloat16_is_as_near_to_float64_as_it_was(options):
    unet = network(**options)
    right, before = run(copy.deepcopy(unet).double(), torch.double), run(copy.deepcopy(unet), half=True)
    names = list(unet.state_dict())
    unet.to(memory_format=torch.channels_last)
    use_fused_blocks(unet)
    kinds = {type(module) for module in unet.modules()}
    assert {FusedResnetBlock2D, FusedSamplerBlock2D, FusedGroupNorm} <= kinds and ResnetBlock2D not in kinds
    assert list(unet.state_dict()) == names
    for now, was in zip(errors(run(unet, half=True), right), errors(before, right), strict=True):
        assert now < 1.1 * was < 0.03
    assert max(errors(run(unet), right)) < 1e-5  # float32 is diffusers' own
    unet.enable_gradient_checkpointing()
    assert torch.equal(run(unet, half=True)[1], run(copy.deepcopy(unet), half=True)[1])


def test_fewer_passes_are_taken_in_half_precision_alone(monkeypatch):
    calls = []
    original = fused._Norm.apply
    monkeypatch.setattr(fused._Norm, "apply", lambda *args: calls.append(args[0].dtype) or original(*args))
    unet = network().to(memory_format=torch.channels_last)
    use_fused_blocks(unet)
    run(unet)
    assert calls == []
    run(unet, half=True)
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert calls == [torch.bfloat16] * (norms - 1)  # but the last, before the output


def test_adapted_layers_are_left_to_diffusers():
    peft = pytest.importorskip("peft")
    unet = network()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    for p in unet.parameters():
        p.requires_grad_(True)
    right = run(copy.deepcopy(unet).double(), torch.double)
    use_fused_blocks(unet)
    assert max(errors(run(unet, half=True), right)) < 0.03


def test_what_it_takes_and_what_it_leaves_to_diffusers():
    norm, x = nn.GroupNorm(4, 16), torch.randn(2, 16, 3, 3)
    with pytest.raises(ValueError, match="expected it with shift, or neither"):
        norm_act(x, norm, scale=torch.ones(2, 16))
    empty = torch.zeros(0, 16, 3, 3, requires_grad=True)
    norm_act(empty, norm).sum().backward()
    assert empty.grad.shape == empty.shape and not norm.weight.grad.any()
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4)
    y, level = x.bfloat16(), torch.randn(2, 16, 1, 1)  # added as it is
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = block(y, level)
        block.__class__ = FusedResnetBlock2D
        assert torch.equal(block(y, level), right)


def test_one_program_serves_all_shapes():
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    step = torch.compile(fused._norm, dynamic=True, fullgraph=True, backend=backend)
    weight, bias = torch.ones(16), torch.zeros(16)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for shape in ((2, 4, 4, 16), (16, 16, 16, 16), (3, 8, 5, 16)):
            x = torch.randn(shape)
            y = step(x, weight, bias, None, None, None, 4, 1e-5, True)[0]
            right = nn.functional.silu(nn.functional.group_norm(x.permute(0, 3, 1, 2), 4))
            torch.testing.assert_close(y.permute(0, 3, 1, 2), right, atol=1e-5, rtol=1e-4)
    assert len(frames) == 1
