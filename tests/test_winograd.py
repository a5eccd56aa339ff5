import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from palette_diffusers import winograd
from palette_diffusers.winograd import WinogradConv2d, sampled, transform_filter, use_winograd, winograd_conv2d


@pytest.mark.parametrize("shape", [(1, 7, 4, 4), (2, 3, 5, 19), (3, 8, 33, 6), (5, 4, 16, 16), (1, 2, 1, 1)])
@pytest.mark.parametrize("at_once", [1, 5, 128])
def test_it_is_the_plain_convolution(shape, at_once, monkeypatch):
    """Of any size, however it is cut, against float64."""
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", at_once)
    image, weight, bias = torch.randn(shape), torch.randn(6, shape[1], 3, 3), torch.randn(6)
    expected = F.conv2d(image.double(), weight.double(), bias.double(), padding=1)
    for given in (image, image.contiguous(memory_format=torch.channels_last)):
        found = winograd_conv2d(given, transform_filter(weight), bias)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4 * expected.std().clamp_min(1)
    torch.testing.assert_close(
        winograd_conv2d(image, transform_filter(weight)), found - bias[:, None, None], atol=1e-4, rtol=1e-4
    )


@pytest.fixture
def layer():
    layer = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    plain = copy.deepcopy(layer)
    assert use_winograd(layer) == 1 and isinstance(layer[0], WinogradConv2d)
    return layer, plain


@pytest.fixture
def used(monkeypatch):
    """How often Winograd's way was taken."""
    calls, original = [], winograd_conv2d
    monkeypatch.setattr(winograd, "winograd_conv2d", lambda *args: calls.append(1) or original(*args))
    return calls


def test_it_is_used_where_it_is_right(layer, used):
    layer, plain = layer
    image = torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(image), plain(image), atol=1e-4, rtol=1e-4)
        assert len(used) == 1
        layer(image[..., :4]), copy.deepcopy(layer).bfloat16()(image.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(image).dtype == torch.bfloat16
        assert len(used) == 1
    layer(image).sum().backward(), plain(image).sum().backward()
    assert len(used) == 1 and torch.equal(layer[0].weight.grad, plain[0].weight.grad)
    assert layer.state_dict().keys() == plain.state_dict().keys() and repr(layer) == repr(plain)


def test_it_follows_its_weights(layer, used):
    """Those that are loaded, trained, and written through `.data`, as merged adapters and moving averages are."""
    layer, plain = layer
    image = torch.randn(1, 128, 16, 16)
    changes = [
        lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
        lambda m: m[0].weight.data.add_(0.1),
        lambda m: m[0].weight.data[:, 1:].mul_(0.5),
        lambda m: m[0].weight.data[7].zero_(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m[0].weight.data[:, 99].zero_(),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)),
    ]
    with torch.no_grad():
        for i, change in enumerate([lambda m: None, *changes], 1):
            change(layer), change(plain)
            torch.testing.assert_close(layer(image), plain(image), atol=1e-3, rtol=1e-4)
            assert len(used) == i
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(layer)(image), plain(image), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (96, 192), (384, 256), (64, 576), (130, 126)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_filter_and_every_input_channel_is_looked_at(shape, layout):
    place = torch.arange(math.prod(shape) * 9).view(*shape, 3, 3).contiguous(memory_format=layout)
    some = sampled(place)
    assert len((some // (9 * shape[1])).unique()) == shape[0] and len((some % (9 * shape[1])).unique()) == 9 * shape[1]
    assert len(some) < 12 * shape[1] and some.data_ptr() == place.data_ptr()


def test_adapters_keep_their_own_convolutions(used):
    """peft makes an adapter's layers of its base's class: 3x3 to few channels, 1x1 from them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=128, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(nn.Sequential(nn.Conv2d(128, 256, 3, padding=1)), config)
    plain, image = copy.deepcopy(adapted), torch.randn(1, 128, 16, 16)
    assert use_winograd(adapted) > 0
    for change in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        with torch.no_grad():
            change(adapted), change(plain)
            torch.testing.assert_close(adapted(image), plain(image), atol=1e-3, rtol=1e-3)
    assert len(used) >= 3


def test_one_that_was_made_of_it_keeps_its_shape(used):
    """As peft does when adapters come after."""
    layer = WinogradConv2d(256, 128, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x := torch.randn(1, 256, 16, 16)), F.conv2d(x, layer.weight, layer.bias))
    assert not used


def test_other_convolutions_stay(used):
    others = [
        nn.Conv2d(128, 128, 1), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 256, 3, padding=1, groups=2), nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2), nn.Conv2d(64, 64, 3, padding=1),
    ]  # fmt: skip
    assert use_winograd(nn.Sequential(*others)) == 0 and all(type(layer) is nn.Conv2d for layer in others)
