"""The testers that diffusers applies to its own models, schedulers and pipelines, applied to ours.

    PYTHONPATH=CHECKOUT python -m pytest benchmarks/diffusers_testers.py

CHECKOUT is a clone of github.com/huggingface/diffusers, whose `tests` package is used with the installed library.
"""

import unittest

import numpy as np
import pytest
import torch
from diffusers import ModelMixin  # noqa: F401  the loader looks for the base class in the component's module
from PIL import Image
from tests.models.testing_utils import BaseModelTesterConfig, MemoryTesterMixin, ModelTesterMixin, TrainingTesterMixin
from tests.models.testing_utils.attention import AttentionTesterMixin
from tests.models.testing_utils.lora import LoraTesterMixin
from tests.pipelines.test_pipelines_common import PipelineTesterMixin
from tests.schedulers.test_schedulers import SchedulerCommonTest
from tests.testing_utils import torch_device

from palette_diffusers import PalettePipeline, PaletteScheduler, PaletteUNet2DModel

SMALL = dict(
    sample_size=32, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=16, layers_per_block=1,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)  # fmt: skip


class Network(PaletteUNet2DModel):
    """Ours, with outputs that training would have moved from zero, so that equal ones mean something."""

    def zero_outputs(self):
        pass


class ModelConfig(BaseModelTesterConfig):
    model_class = Network
    main_input_name = "sample"
    output_shape = (3, 32, 32)

    def get_init_dict(self):
        return dict(SMALL)

    def get_dummy_inputs(self):
        generator = torch.Generator().manual_seed(0)
        sample, condition = (torch.randn(2, 3, 32, 32, generator=generator).to(torch_device) for _ in range(2))
        return {"sample": sample, "noise_level": torch.tensor([0.5, 0.01]).to(torch_device), "condition": condition}


class TestModel(ModelConfig, ModelTesterMixin):
    pass


class TestModelTraining(ModelConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        blocks = {"ResnetDownsampleBlock2D", "AttnDownBlock2D", "UNetMidBlock2D", "AttnUpBlock2D"}
        super().test_gradient_checkpointing_is_applied(expected_set=blocks | {"ResnetUpsampleBlock2D"})


class TestModelMemory(ModelConfig, MemoryTesterMixin):
    pass


class TestModelAttention(ModelConfig, AttentionTesterMixin):
    pass


class TestModelLora(ModelConfig, LoraTesterMixin):
    pass


class TestScheduler(SchedulerCommonTest):
    scheduler_classes = (PaletteScheduler,)
    forward_default_kwargs = (("num_inference_steps", 50),)

    def get_scheduler_config(self, **changes):
        return dict(num_train_timesteps=1000, beta_start=1e-6, beta_end=0.02) | changes


class TestPipeline(PipelineTesterMixin, unittest.TestCase):
    pipeline_class = PalettePipeline
    params = frozenset(["image", "task", "mask_image"])
    batch_params = frozenset(["image"])
    required_optional_params = frozenset(
        ["num_inference_steps", "num_images_per_input", "generator", "latents", "output_type", "return_dict"]
    )
    test_layerwise_casting = True
    test_group_offloading = True

    def get_dummy_components(self):
        torch.manual_seed(0)
        # as the starter; rounding of a noise prediction is divided by sqrt(gamma), which is 1e-10 at the first step
        settings = dict(sampling_variance="fixed_small", prediction_type="v_prediction")
        return {"unet": Network(**SMALL), "scheduler": PaletteScheduler(**settings)}

    def get_dummy_inputs(self, device, seed=0):
        pixels = np.random.RandomState(seed).randint(0, 256, (32, 32, 3), np.uint8)
        return {
            "image": Image.fromarray(pixels), "task": "colorization", "num_inference_steps": 2, "output_type": "np",
            "generator": torch.Generator().manual_seed(seed),
        }  # fmt: skip

    def test_callback_inputs(self):
        """As diffusers' own pipelines without latents override it (`PRXPixelPipeline`); a change arrives, too."""
        pipe = self.pipeline_class(**self.get_dummy_components())
        seen = []

        def callback(pipe, i, t, tensors):
            seen.append(set(tensors))
            return tensors | ({"sample": torch.zeros_like(tensors["sample"])} if "sample" in tensors else {})

        for names in (["pred_original_sample"], pipe._callback_tensor_inputs):
            inputs = self.get_dummy_inputs(torch_device) | {"task": "jpeg_restoration", "output_type": "pt"}
            out = pipe(**inputs, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)[0]
            assert set(names) == seen[-1]
        assert out.abs().sum() == 0


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q", "-rfs"]))
