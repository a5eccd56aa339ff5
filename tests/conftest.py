import socket

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from palette_diffusers import PalettePipeline, PaletteScheduler, PaletteUNet2DModel

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def toy_unet(seed: int = 0, **options) -> PaletteUNet2DModel:
    """A network of a few channels whose zero-initialised outputs are made random, so that it does something."""
    torch.manual_seed(seed)
    settings = dict(
        sample_size=32,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=16,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    unet = PaletteUNet2DModel(**(settings | options))
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    return unet.eval()


@pytest.fixture
def unet():
    return toy_unet()


@pytest.fixture
def pipe(unet):
    pipe = PalettePipeline(unet, PaletteScheduler(), default_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """The astronaut (public domain, NASA), 150 x 200 pixels of it: (H, W, 3) uint8."""
    from skimage import data

    return data.astronaut()[:150, 100:300].copy()


@pytest.fixture
def seeded():
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path, photo):
    """Six small photographs to train on."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(photo[i * 10 : i * 10 + 80, i * 10 : i * 10 + 90]).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"
