"""The starter's pictures of one photograph, by which versions and processes are compared.

    python tests/golden.py [FOLDER]

writes them, to tests/fixtures/golden/ where no folder is named. Do that only where a picture is meant to change.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from skimage import data

from palette_diffusers import PalettePipeline, canvas

FOLDER = Path(__file__).parent / "fixtures" / "golden"
OPTIONS = {
    "colorization": {},
    "inpainting": {"mask_image": "20,16,40,44"},
    "uncropping": {"right": 24},
    "jpeg_restoration": {},
}


def photograph() -> np.ndarray:
    """64 pixels of the astronaut (public domain, NASA): (64, 64, 3) uint8."""
    face = data.astronaut()[0:256, 96:352].reshape(64, 4, 64, 4, 3)
    return face.mean((1, 3)).round().astype(np.uint8)


def write(folder: Path) -> None:
    pipe = PalettePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    for task, options in OPTIONS.items():
        generator = torch.Generator().manual_seed(0)
        image = pipe(photograph(), task, num_inference_steps=8, generator=generator, **options).images[0]
        canvas.save(image, folder / f"{task}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
