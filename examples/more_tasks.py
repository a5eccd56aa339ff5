"""Deblurring and denoising, registered as a user's own tasks and trained together:

accelerate launch examples/more_tasks.py --data FOLDER --output runs/mend --steps 2000
"""

import math

import torch
import torch.nn.functional as F

from palette_diffusers import Task, register_task
from palette_diffusers.training import main


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """(B, C, H, W) blurred by a Gaussian of `sigma` pixels, the border reflected."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(image).expand(image.shape[1], 1, 1, -1)
    padded = F.pad(image, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel, groups=image.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=image.shape[1])


@register_task
class Deblurring(Task):
    """A lens out of focus: Gaussian blur of 0.5 to 3 pixels."""

    name = "deblurring"
    strategy = "tiles"

    def degrade(self, clean, generator=None):
        sigma = 0.5 + 2.5 * torch.rand((), generator=generator).item()
        return self.prepare(gaussian_blur(clean, sigma))


@register_task
class Denoising(Task):
    """A photograph at high ISO: Gaussian noise of 5 to 50 of 255 levels."""

    name = "denoising"
    strategy = "tiles"

    def degrade(self, clean, generator=None):
        levels = 5 + 45 * torch.rand((), generator=generator).item()
        noise = torch.randn(clean.shape, generator=generator)
        return self.prepare((clean + noise * levels / 127.5).clamp(-1, 1))


if __name__ == "__main__":
    main(tasks="deblurring,denoising")
