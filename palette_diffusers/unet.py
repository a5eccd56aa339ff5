"""The Palette U-Net: ADM with the source image concatenated, conditioned on the continuous noise level gamma.

Images are (B, C, H, W), RGB, [-1, 1]; gamma is a float32 tensor (B,) in (0, 1].
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .scheduler import condition_velocity, is_number, timestep_of

NOISE_EMBEDDINGS = ("logsnr", "gamma", "sqrt_gamma", "timestep")


class PaletteAttnProcessor:
    """Self-attention through `dispatch_attention_fn`, so that `set_attention_backend` takes effect
    (the library's stock processor for this block ignores it), and gradient checkpointing covers it."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, temb: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and getattr(attn, "gradient_checkpointing", False):
            return attn._gradient_checkpointing_func(self._attend, attn, hidden_states)
        return self._attend(attn, hidden_states)

    def _attend(self, attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[2:]
        x = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states)
        # (B, H*W, C); channels_last is that already, else each projection below would copy it again
        x = x.flatten(2).transpose(1, 2).contiguous()
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # (B, H*W, heads, C/heads)
        x = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        x = attn.to_out[0](x.flatten(2).to(query.dtype))
        x = x.transpose(1, 2).unflatten(2, (height, width))
        x = hidden_states + x
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


class SamplerBlock2D(ResnetBlock2D):
    """A residual block that changes resolution, which diffusers' blocks leave out of gradient checkpointing, though it
    works at the higher one."""

    gradient_checkpointing = False

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(super().forward, input_tensor, temb)
        return super().forward(input_tensor, temb)


class _OneByOne(dict[str, torch.Tensor]):
    """A file of weights to be cast, mapped anew for every tensor: as a whole it is never held beside the cast."""

    def __init__(self, path: str | os.PathLike):
        self._path = path
        with safe_open(path, framework="pt") as file:
            super().__init__(dict.fromkeys(file.keys()))  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)


def _are_betas(values: Any) -> bool:
    """Whether this is a first beta, a last beta and a number of steps."""
    three = isinstance(values, (list, tuple)) and len(values) == 3 and all(is_number(value) for value in values)
    return three and all(0 < beta < 1 for beta in values[:2]) and values[2] >= 2 and int(values[2]) == values[2]


def check_inputs(
    network: Any, sample: torch.Tensor, noise_level: torch.Tensor | float, condition: torch.Tensor
) -> torch.Tensor:
    """Arguments of a network's `forward` => gamma, float32 (B,). Numbers in tensors are not looked at: a GPU would have
    to be waited for.

    Raises:
        ValueError: shapes that disagree or that are not the network's, a number outside (0, 1].
    """
    config, multiple = network.config, network.size_multiple
    extra = 1 if config.hole_skip else 0
    for name, tensor, channels in (
        ("sample", sample, config.in_channels), ("condition", condition, config.condition_channels + extra),
    ):  # fmt: skip
        if tensor.dim() != 4 or tensor.shape[1] != channels:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected (B, {channels}, H, W)")
    if sample.shape[0] != condition.shape[0] or sample.shape[2:] != condition.shape[2:]:
        raise ValueError(
            f"sample is {tuple(sample.shape)}, condition {tuple(condition.shape)}: "
            "batch, height and width must be the same"
        )
    if sample.shape[2] % multiple or sample.shape[3] % multiple:
        raise ValueError(f"sample is {sample.shape[3]}x{sample.shape[2]}, expected multiples of {multiple} pixels")
    if isinstance(noise_level, (int, float)) and not 0 < noise_level <= 1:
        raise ValueError(f"noise_level is {noise_level}, expected above 0 and at most 1")
    gamma = torch.as_tensor(noise_level, dtype=torch.float32, device=sample.device)
    if gamma.dim() > 1 or (gamma.dim() == 1 and gamma.shape[0] != sample.shape[0] and gamma.shape[0] != 1):
        raise ValueError(
            f"noise_level is {tuple(gamma.shape)}, expected one number or ({sample.shape[0]},), one for each picture"
        )
    return gamma.expand(sample.shape[0])


class PaletteUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """The network f(x, y, gamma) of the paper; its state-dict keys are those of diffusers' `UNet2DModel`.

    The defaults are the paper's network: 552.8M parameters, attention at 32, 16 and 8 of 256 pixels.

    Args:
        sample_size: height and width the network is trained at, pixels.
        in_channels, condition_channels, out_channels: of the noisy image, the source image and the output.
        block_out_channels: channels of each level; each level but the last halves the resolution.
        down_block_types, up_block_types: names of the library's blocks, first level first / last level first.
        layers_per_block: residual blocks a level on the way down (one more on the way up).
        attention_head_dim: channels a head; None is one head.
        norm_num_groups: groups of every group norm.
        resample_type: "resnet" (ADM) or "conv", how the attention blocks change resolution; the other blocks'
            names say it ("ResnetDownsampleBlock2D", or the cheaper "DownBlock2D").
        downsample_padding: 1, or 0 (at the right and bottom only), of the convolutions in "conv".
        resnet_time_scale_shift: how the noise level enters a residual block: "scale_shift" (ADM) or "default" (added).
        add_attention: attention in the middle block.
        dropout: probability in the residual blocks.
        patch_size: space-to-depth at both ends; 2 runs the whole network at half the resolution.
        condition_skip: standard deviation of the error that the source image has where it shows anything, 0.2
            say; 0 is the paper's network. Above 0, the network corrects the best linear guess from the noisy
            image and the source, and one more output gates that guess pixel by pixel. Much faster to train; for
            `prediction_type="v_prediction"` only.
        hole_skip: the same in a hole that was filled smoothly, 0.5 say; 0 is the paper's noise. Above 0, the
            condition has one more channel, 1 in the hole (`tasks.network_condition`).
        noise_embedding_type: what of gamma is embedded: "logsnr" resolves levels near 0 and 1, "gamma" and
            "sqrt_gamma" are other implementations', "timestep" is that of networks trained on numbered steps.
        noise_embedding_scale: factor on it, before sines of frequencies 1 to 1e-4.
        logsnr_min, logsnr_max: "logsnr" is clamped to this range (natural logarithm).
        timestep_betas: "timestep" numbers the levels of this linear schedule: first beta, last beta, steps.
        flip_sin_to_cos, freq_shift: layout of the sinusoidal embedding.

    Source: Saharia et al. 2022, section 3; Dhariwal & Nichol 2021 (ADM), appendix.

    >>> unet = PaletteUNet2DModel(32, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=32,
    ...     down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    ...     up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"))
    >>> image = torch.zeros(2, 3, 32, 32)
    >>> unet(image, torch.tensor([0.5, 1e-4]), image).sample.shape
    torch.Size([2, 3, 32, 32])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "SamplerBlock2D", "Attention"]
    _repeated_blocks = ["ResnetBlock2D", "SamplerBlock2D", "Attention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        condition_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (256, 256, 512, 512, 1024, 1024),
        down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types: Sequence[str] = ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        layers_per_block: int = 2,
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resample_type: str = "resnet",
        downsample_padding: int = 1,
        resnet_time_scale_shift: str = "scale_shift",
        add_attention: bool = True,
        dropout: float = 0.0,
        patch_size: int = 1,
        condition_skip: float = 0.0,
        hole_skip: float = 0.0,
        noise_embedding_type: str = "logsnr",
        noise_embedding_scale: float = 40.0,
        logsnr_min: float = -10.0,
        logsnr_max: float = 14.0,
        timestep_betas: Sequence[float] = (1e-4, 0.02, 1000),
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        if hole_skip and not condition_skip:
            raise ValueError(f"hole_skip is {hole_skip}, but condition_skip 0: expected both, or none")
        if condition_skip and (out_channels != in_channels or condition_channels not in (1, out_channels)):
            raise ValueError(
                f"in_channels is {in_channels}, condition_channels {condition_channels} and out_channels "
                f"{out_channels}: they must be the same with condition_skip"
            )
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size is {patch_size!r}, expected a whole number of at least 1")
        if not _are_betas(timestep_betas):
            raise ValueError(
                f"timestep_betas is {timestep_betas!r}, expected three numbers: first and last beta, between 0 and 1, "
                "and steps, at least 2"
            )
        if len(down_block_types) != levels or len(up_block_types) != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels, down_block_types {len(down_block_types)} and "
                f"up_block_types {len(up_block_types)}: they must have the same number"
            )
        if noise_embedding_type not in NOISE_EMBEDDINGS:
            raise ValueError(
                f"noise_embedding_type is {noise_embedding_type!r}, expected one of {', '.join(NOISE_EMBEDDINGS)}"
            )
        channels, embedding = block_out_channels[0], block_out_channels[0] * 4
        common = dict(
            temb_channels=embedding,
            resnet_eps=norm_eps,
            resnet_act_fn="silu",
            resnet_groups=norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
            dropout=dropout,
        )

        # input
        inputs = in_channels + condition_channels + (1 if hole_skip else 0)
        self.conv_in = nn.Conv2d(inputs * patch_size**2, channels, 3, padding=1)

        # noise level
        self.time_proj = Timesteps(channels, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels, embedding)

        # down
        self.down_blocks = nn.ModuleList()
        width = channels
        for i, kind in enumerate(down_block_types):
            self.down_blocks.append(
                get_down_block(
                    kind,
                    num_layers=layers_per_block,
                    in_channels=width,
                    out_channels=block_out_channels[i],
                    add_downsample=i < levels - 1,
                    downsample_padding=downsample_padding,
                    downsample_type=resample_type,
                    attention_head_dim=attention_head_dim or block_out_channels[i],
                    **common,
                )
            )
            width = block_out_channels[i]

        # middle
        self.mid_block = UNetMidBlock2D(
            in_channels=width,
            attn_groups=norm_num_groups,
            add_attention=add_attention,
            attention_head_dim=attention_head_dim or width,
            **common,
        )

        # up
        self.up_blocks = nn.ModuleList()
        widths = list(reversed(block_out_channels))
        for i, kind in enumerate(up_block_types):
            self.up_blocks.append(
                get_up_block(
                    kind,
                    num_layers=layers_per_block + 1,
                    in_channels=widths[min(i + 1, levels - 1)],
                    out_channels=widths[i],
                    prev_output_channel=widths[max(i - 1, 0)],
                    add_upsample=i < levels - 1,
                    upsample_type=resample_type,
                    attention_head_dim=attention_head_dim or widths[i],
                    **common,
                )
            )

        # output
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.conv_act = nn.SiLU()
        outputs = out_channels + (1 if condition_skip else 0)
        self.conv_out = nn.Conv2d(channels, outputs * patch_size**2, 3, padding=1)

        for module in self.modules():
            if type(module) is ResnetBlock2D and (module.up or module.down):
                module.__class__ = SamplerBlock2D
            elif isinstance(module, Attention):
                module.gradient_checkpointing = False
        # what FSDP divides by must be there
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in kinds]
        self.set_attn_processor(PaletteAttnProcessor())
        self.zero_outputs()

    def zero_outputs(self) -> None:
        """ADM's initialisation: the last layer of every residual branch, and of the network, is zero."""
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last = module.conv2
            elif isinstance(module, Attention):
                last = module.to_out[0]
            elif module is self:
                last = self.conv_out
            else:
                continue
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @classmethod
    def _load_pretrained_model(
        cls, model: ModelMixin, state_dict: Any, resolved_model_file: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        files = [str(file) for file in resolved_model_file]
        plain = kwargs["low_cpu_mem_usage"] and kwargs.get("hf_quantizer") is None
        if plain and all(file.endswith(".safetensors") for file in files):
            dtype = kwargs["dtype"] or model.dtype
            if any(weight.dtype != dtype for weight in (state_dict or load_file(files[0])).values()):
                state_dict, resolved_model_file = None, [_OneByOne(file) for file in files]
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As usual. Residual blocks without dropout compute the same in both modes, but copy their input to another
        layout when they train (`ResnetBlock2D`, before `conv_shortcut`): they are left in that of evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D) and not module.dropout.p:
                module.training = False
        return self

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As usual. A kind of block is compiled for every shape of it that there is: by torch's own limit, those beyond
        the eighth would stay eager."""
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 256)
        super().compile_repeated_blocks(*args, **kwargs)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def embed_noise_level(self, gamma: torch.Tensor) -> torch.Tensor:
        """gamma (B,) in float32 => sines and cosines (B, C) in float32."""
        gamma = gamma.float()
        config = self.config
        if config.noise_embedding_type == "logsnr":
            # log gamma - log(1 - gamma) and not logit: exact near both ends in float32
            gamma = (gamma.log() - torch.log1p(-gamma)).clamp(config.logsnr_min, config.logsnr_max)
        elif config.noise_embedding_type == "sqrt_gamma":
            gamma = gamma.sqrt()
        elif config.noise_embedding_type == "timestep":
            beta_start, beta_end, steps = config.timestep_betas
            gamma = timestep_of(gamma, beta_start, beta_end, int(steps))
        return self.time_proj(gamma * config.noise_embedding_scale)

    def encode(
        self, sample: torch.Tensor, gamma: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """The half that looks: what `forward` is given, gamma being (B,), => the middle's output, the skip connections
        from the finest to the coarsest, and the embedding (B, C) of the noise level."""
        # embedding
        temb = self.time_embedding(self.embed_noise_level(gamma).to(self.dtype))

        # input
        hidden = torch.cat([sample, condition], dim=1).to(self.dtype)
        if self.config.patch_size > 1:
            hidden = F.pixel_unshuffle(hidden, self.config.patch_size)
        hidden = self.conv_in(hidden)

        # encoder
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, states = block(hidden, temb)
            skips += states

        # middle
        return self.mid_block(hidden, temb), skips, temb

    def forward(
        self,
        sample: torch.Tensor,
        noise_level: torch.Tensor | float,
        condition: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise (or what the scheduler's `prediction_type` says) in `sample`.

        Args:
            sample: the noisy image y, (B, C, H, W), in any dtype; the output has the same.
            noise_level: gamma in (0, 1], a float32 tensor (B,) or one number for all.
            condition: the source image x, (B, C, H, W) of the same height and width; C + 1 with `hole_skip`.

        Raises:
            ValueError: shapes that disagree or that are not the network's, sizes that are no multiple of
                `size_multiple`, a number outside (0, 1].
        """
        gamma = check_inputs(self, sample, noise_level, condition)
        hidden, skips, temb = self.encode(sample, gamma, condition)

        # decoder
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, states = skips[:-count], skips[-count:]
            hidden = block(hidden, states, temb)

        # output
        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        if self.config.patch_size > 1:
            hidden = F.pixel_shuffle(hidden, self.config.patch_size)

        # source
        if self.config.condition_skip:
            hidden, gate = hidden.float().split([self.config.out_channels, 1], dim=1)
            source, hole = condition.float().tensor_split([self.config.condition_channels], dim=1)
            error = self.config.condition_skip
            if self.config.hole_skip:
                error = error + (self.config.hole_skip - error) * hole
            guess = condition_velocity(sample, source, gamma, error)
            hidden = hidden + gate.sigmoid() * guess
        hidden = hidden.to(sample.dtype)
        return UNet2DOutput(sample=hidden) if return_dict else (hidden,)
