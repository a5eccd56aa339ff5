"""A critic for few-step students: it tells photographs from a student's pictures, so that these get the detail that a
squared error leaves out.

A student's step is a mean over what its teacher might paint, and its teacher is no better than its own few steps. The
critic knows neither: it compares with the photograph itself, in what the teacher's encoder sees of both after the same
noise (latent adversarial diffusion distillation, Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent
Adversarial Diffusion Distillation"), and only asks which of the two is the more real (relativistic pairing,
Jolicoeur-Martineau 2018; Huang et al. 2024, "The GAN is dead; long live the GAN!"). The two share their source, which
the encoder sees as well. Images are (B, 3, H, W), RGB, [-1, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .scheduler import diffuse, predicted_original
from .tasks import Given, fill_holes, get_task

LOGSNR = (-2.0, 7.0)  # the noise that pictures are compared under
CHANNELS = 64  # of a head


class Critic(nn.Module):
    """Heads on the encoder of a frozen network, one for each of its resolutions and one for its middle.

    Args:
        unet: the teacher's network, which stays as it is.
        tasks: the names of a batch's tasks, in the order of their numbers.
        prediction_type: what the student predicts.
    """

    def __init__(self, unet: Any, tasks: Sequence[str], prediction_type: str):
        super().__init__()
        self._encode = unet.encode
        self._dtype = unet.dtype
        self.tasks, self.prediction_type = [get_task(task) for task in tasks], prediction_type
        config = unet.config
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(config.norm_num_groups, width),
                nn.Conv2d(width, CHANNELS, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(CHANNELS, 1, 1),
            )
            for width in [*config.block_out_channels, config.block_out_channels[-1]]
        )

    def draw(self, batch: dict[str, torch.Tensor], real: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `compare` reads, added to a batch: the photographs `real`, and the noise they are compared under."""
        low, high = LOGSNR
        level = low + (high - low) * torch.rand(len(real), device=real.device)
        return batch | {"real": real, "critic_noise": torch.randn_like(real), "critic_gamma": torch.sigmoid(level)}

    def picture(self, output: torch.Tensor, noisy: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The picture that an output stands for, with what is known put into it, as in sampling."""
        y0 = out = predicted_original(output, noisy, batch["gamma"], self.prediction_type).clamp(-1, 1)
        for number, task in enumerate(self.tasks):  # of all rows: a recording of the step cannot pick some
            given = Given(batch["known"], batch["condition"][:, :3], batch["mask"] if task.takes_mask else None)
            out = torch.where((batch["task"] == number)[:, None, None, None], task.guide(y0, given), out)
        return out

    def features(
        self, image: torch.Tensor, condition: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Of each resolution, and of the middle: (B, C, H, W) in float32. The condition's hole is filled."""
        gamma = batch["critic_gamma"]
        noisy = diffuse(image, batch["critic_noise"], gamma)
        with torch.autocast(image.device.type, enabled=False):
            middle, skips, _ = self._encode(noisy.to(self._dtype), gamma, condition)
        last = {skip.shape[-1]: skip for skip in skips}
        return [feature.float() for feature in (*last.values(), middle)]

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Scores, higher is more real: (B, 1, H, W) of each of the features."""
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]

    def compare(self, fake: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The student's loss of each sample, (B,), the critic's own, (B,), and the share of patches that it tells
        apart, (B,). Each has gradients for its own side alone; means over the hole where there is one."""
        condition = fill_holes(batch["condition"])
        with torch.no_grad():
            real = self.features(batch["real"], condition, batch)
        seen = self.features(fake, condition, batch)
        own = self([torch.cat([a, b.detach()]) for a, b in zip(real, seen, strict=True)])
        frozen = {name: value.detach() for name, value in self.named_parameters()}
        judged = functional_call(self, frozen, (seen,))
        student, critic, right = (torch.zeros(len(fake), device=fake.device) for _ in range(3))
        for both, score in zip(own, judged, strict=True):
            a, b = both.chunk(2)
            weight = F.adaptive_max_pool2d(batch["mask"], score.shape[-2:])
            weight = weight / weight.sum((1, 2, 3), keepdim=True).clamp_min(1) / len(own)
            student = student + (F.softplus(a.detach() - score) * weight).sum((1, 2, 3))
            critic = critic + (F.softplus(b - a) * weight).sum((1, 2, 3))
            right = right + ((a > b) * weight).sum((1, 2, 3))
        return student, critic, right
