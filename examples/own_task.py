"""A task of one's own, trained:  accelerate launch examples/own_task.py --data FOLDER --output runs/x4 --steps 2000

Super-resolution: a quarter of the resolution => all of it. Every option of train/train_palette.py works here.
"""

import torch.nn.functional as F

from palette_diffusers import Task, register_task
from palette_diffusers.training import main


@register_task
class SuperResolution(Task):
    name = "super_resolution"
    strategy = "tiles"  # at the photograph's own resolution

    def degrade(self, clean, generator=None):
        small = F.interpolate(clean, scale_factor=0.25, mode="bicubic", antialias=True)
        return self.prepare(F.interpolate(small, clean.shape[-2:], mode="bicubic").clamp(-1, 1))


if __name__ == "__main__":
    main(tasks="super_resolution")
