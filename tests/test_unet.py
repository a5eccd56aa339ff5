import pytest
import torch
from conftest import toy_unet
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from palette_diffusers import PaletteUNet2DModel
from palette_diffusers.scheduler import diffuse, predicted_original
from palette_diffusers.unet import SamplerBlock2D


def inputs(batch=2, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=g)
    return x, torch.linspace(0.1, 0.9, batch), torch.randn(batch, 3, size, size, generator=g)


def test_papers_size_on_the_meta_device():
    with torch.device("meta"):
        unet = PaletteUNet2DModel()
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(552.8e6, abs=0.05e6)
    attention = {n.split(".attentions")[0] for n, _ in unet.named_modules() if ".attentions" in n}
    assert attention == {f"down_blocks.{i}" for i in (3, 4, 5)} | {f"up_blocks.{i}" for i in (0, 1, 2)} | {"mid_block"}


def test_state_dict_keys_and_outputs_are_the_librarys():
    """A stock UNet2DModel with our weights, told the embedding's argument as its timestep, agrees."""
    ours = toy_unet()
    stock = UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet", upsample_type="resnet",
        attention_head_dim=16, norm_num_groups=8, attn_norm_num_groups=8, resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    assert set(stock.state_dict()) == set(ours.state_dict())
    stock.load_state_dict(ours.state_dict())
    x, gamma, condition = inputs()
    timestep = torch.log(gamma / (1 - gamma)) * 40
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, gamma, condition).sample, stock(torch.cat([x, condition], 1), timestep).sample, atol=5e-5, rtol=0
        )


def test_fresh_network_returns_zero():
    unet = PaletteUNet2DModel(32, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=16,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"))  # fmt: skip
    x, gamma, condition = inputs()
    assert not unet(x, gamma, condition).sample.any()


@pytest.mark.parametrize("pair", [(1e-4, 1e-3), (0.99, 0.999), (0.5, 0.51)])
def test_embedding_resolves_gamma_everywhere(pair):
    a, b = toy_unet().embed_noise_level(torch.tensor(pair))
    assert (a - b).abs().max() > 0.3


def test_gamma_may_be_a_number_and_is_not_rounded(unet):
    x, _, condition = inputs()
    with torch.no_grad():
        half = unet(x, 0.5, condition).sample
        torch.testing.assert_close(half, unet(x, torch.tensor([0.5, 0.5]), condition).sample)
        assert (half - unet(x, 0.01, condition).sample).abs().max() > 1e-3


def test_condition_is_seen(unet):
    x, gamma, condition = inputs()
    with torch.no_grad():
        assert (unet(x, gamma, condition).sample - unet(x, gamma, -condition).sample).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_attention_backend_is_called(unet, name, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    backend = dispatch.AttentionBackendName(name)
    original, calls = dispatch._AttentionBackendRegistry._backends[backend], []

    def spy(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(dispatch._AttentionBackendRegistry._backends, backend, spy)
    registry = dispatch._AttentionBackendRegistry  # a model's backend becomes that of all: back to what it was
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    x, gamma, condition = inputs()
    with torch.no_grad():
        expected = unet(x, gamma, condition).sample
        calls.clear()
        unet.set_attention_backend(name)
        torch.testing.assert_close(unet(x, gamma, condition).sample, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 4  # one down, two up, one in the middle


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        unet = toy_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(*inputs()).sample.square().mean().backward()
        grads.append(unet.conv_in.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_covers_attention_and_changes_of_resolution():
    """diffusers' blocks leave both out: at most the two tensors that go into a block are kept."""
    unet, kept = toy_unet(), {}
    unet.enable_gradient_checkpointing()

    def entered(module, args):
        kept[module] = []
        module.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept[module].append(t) or t, lambda t: t)
        module.hooks.__enter__()

    for module in unet.modules():
        if isinstance(module, (Attention, SamplerBlock2D)):
            module.register_forward_pre_hook(entered)
            module.register_forward_hook(lambda module, args, out: module.hooks.__exit__(None, None, None))
    unet(*inputs())
    assert {type(module) for module in kept} == {Attention, SamplerBlock2D}
    assert max(map(len, kept.values())) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, gamma, condition = inputs()
    with torch.no_grad():
        full = toy_unet()(x, gamma, condition).sample
        half = toy_unet().to(dtype)(x.to(dtype), gamma, condition.to(dtype)).sample
    assert half.dtype == dtype and (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_channels_last(unet):
    x, gamma, condition = inputs()
    with torch.no_grad():
        expected = unet(x, gamma, condition).sample
        torch.testing.assert_close(
            unet.to(memory_format=torch.channels_last)(x, gamma, condition).sample, expected, atol=1e-5, rtol=1e-4
        )


def test_lora_adapter_round_trip(unet, tmp_path):
    from peft import LoraConfig

    x, gamma, condition = inputs()
    with torch.no_grad():
        plain = unet(x, gamma, condition).sample
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
        changed = unet(x, gamma, condition).sample
        assert (changed - plain).abs().max() > 1e-4
        unet.save_lora_adapter(tmp_path, adapter_name="a")
        other = toy_unet()
        other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(other(x, gamma, condition).sample, changed)
        unet.disable_adapters()
        torch.testing.assert_close(unet(x, gamma, condition).sample, plain)


def test_patches_and_conv_resampling():
    unet = toy_unet(patch_size=2, resample_type="conv", down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    with torch.no_grad():
        assert unet(*inputs()).sample.shape == (2, 3, 32, 32)
    assert unet.size_multiple == 4


def test_save_and_load_round_trip(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = PaletteUNet2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()


def test_device_map_loads(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = PaletteUNet2DModel.from_pretrained(tmp_path, device_map="cpu").eval()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)


def test_sizes_that_do_not_fit_are_refused(unet):
    x, gamma, condition = inputs()
    with pytest.raises(ValueError, match="32x31.*multiples of 2"):
        unet(x[:, :, :31], gamma, condition[:, :, :31])
    with pytest.raises(ValueError, match="must be the same"):
        unet(x, gamma, condition[:1])
    with pytest.raises(ValueError, match="levels"):
        toy_unet(block_out_channels=(16, 32, 64))
    with pytest.raises(ValueError, match="expected one of logsnr"):
        toy_unet(noise_embedding_type="step")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": torch.zeros(2, 1, 32, 32)}, r"sample is \(2, 1, 32, 32\), expected \(B, 3, H, W\)"),
        ({"sample": torch.zeros(3, 32, 32)}, r"sample is \(3, 32, 32\), expected \(B, 3, H, W\)"),
        ({"condition": torch.zeros(2, 4, 32, 32)}, r"condition is \(2, 4, 32, 32\), expected \(B, 3, H, W\)"),
        ({"noise_level": torch.rand(3)}, r"noise_level is \(3,\), expected one number or \(2,\)"),
        ({"noise_level": torch.rand(2, 1)}, r"noise_level is \(2, 1\), expected one number or \(2,\)"),
        ({"noise_level": 0}, "noise_level is 0, expected above 0 and at most 1"),
        ({"noise_level": 1.5}, "noise_level is 1.5, expected above 0 and at most 1"),
        ({"noise_level": float("nan")}, "noise_level is nan, expected above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(unet, change, message):
    given = dict(zip(("sample", "noise_level", "condition"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        unet(**given | change)


@pytest.mark.parametrize("level", [1.0, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 0.1])])
def test_levels_for_one_or_all(unet, level):
    x, _, condition = inputs()
    with torch.no_grad():
        assert torch.isfinite(unet(x, level, condition).sample).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out_channels": 4, "condition_skip": 0.2}, "in_channels is 3, .* out_channels 4: they must be the same with"),
        ({"condition_channels": 2, "condition_skip": 0.2}, "condition_channels 2 .*: they must be the same"),
        ({"patch_size": 0}, "patch_size is 0, expected a whole number of at least 1"),
        ({"timestep_betas": (1e-4, 0.02)}, r"timestep_betas is \(0.0001, 0.02\), expected three numbers"),
        ({"timestep_betas": (1e-4, 2.0, 1000)}, "timestep_betas is .*between 0 and 1"),
        ({"timestep_betas": (1e-4, 0.02, 1)}, "timestep_betas is .*at least 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        toy_unet(**options)


def test_condition_skip_starts_from_the_source():
    """Untrained, half of the guess; with the gate open, a source without error comes back at every level."""
    unet = toy_unet(condition_skip=0.2)
    x, eps = torch.rand(2, 2, 3, 32, 32).unbind()
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.copy_(torch.tensor([0.0, 0, 0, 20]))
        for gamma in (0.001, 0.5, 0.999):
            y = diffuse(x, eps, gamma)
            y0 = predicted_original(unet(y, gamma, x).sample, y, gamma, "v_prediction")
            noise = (1 - gamma) / gamma
            assert (y0 - x).abs().max() < 1.1 * (0.04 / (0.04 + noise)) * noise**0.5 * eps.max() + 1e-4
        unet.conv_out.bias.copy_(torch.tensor([0.0, 0, 0, -20]))
        assert unet(y, 0.5, x).sample.abs().max() < 1e-6
    half = toy_unet(condition_skip=0.2).to(torch.bfloat16)
    assert half(y, 0.5, x).sample.dtype == torch.float32  # the guess keeps the precision of the picture


def test_hole_skip_trusts_a_fill_less_than_pixels():
    unet = toy_unet(condition_skip=0.2, hole_skip=0.5)
    assert unet.conv_in.in_channels == 7
    x = torch.rand(1, 3, 32, 32)
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., 16:] = 1
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.copy_(torch.tensor([0.0, 0, 0, 20]))
        y = diffuse(x * 0, torch.randn(x.shape), 0.5)  # of another picture: black
        y0 = predicted_original(unet(y, 0.5, torch.cat([x, hole], 1)).sample, y, 0.5, "v_prediction")
    noise = 1.0
    for part, error in ((slice(0, 16), 0.2), (slice(16, 32), 0.5)):
        share = noise / (noise + error**2)
        expected = share * x[..., part] + (1 - share) * y[..., part] / 0.5**0.5
        torch.testing.assert_close(y0[..., part], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="hole_skip is 0.5, but condition_skip 0"):
        toy_unet(hole_skip=0.5)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(storage):
    unet, plain = toy_unet(), toy_unet()
    x = torch.rand(1, 3, 32, 32)
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert unet.conv_out.weight.dtype == storage
    with torch.no_grad():
        expected, got = plain(x, 0.5, x).sample, unet(x, 0.5, x).sample
    assert 0 < (got - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_compile_repeated_blocks():
    unet, plain = toy_unet(), toy_unet()
    x = torch.rand(1, 3, 32, 32)
    unet.compile_repeated_blocks(backend="aot_eager")  # the graph alone: no C++ compiler is needed
    with torch.no_grad():
        torch.testing.assert_close(unet(x, 0.5, x).sample, plain(x, 0.5, x).sample, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_training_copies_no_channels_last_tensor_to_another_layout(unet):
    """diffusers' residual blocks do, before a shortcut, in training mode; with dropout they must train."""
    unet.train()
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    assert unet.training and unet.down_blocks.training and not any(block.training for block in blocks)
    assert all(block.conv1.training for block in blocks)
    blocks[0].dropout.p = 0.5
    assert unet.train() is unet and blocks[0].training and not blocks[1].training
    assert not any(module.training for module in unet.eval().modules())
