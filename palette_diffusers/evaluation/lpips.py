"""LPIPS: how different two pictures look, by AlexNet's features and weights that were fitted to people's judgements.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1. The
fitted weights are torchmetrics' copy; AlexNet's come from a file, as torchvision, which has them, is not needed else.
Images are (B, 3, H, W), RGB, [-1, 1].
"""

import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .store import fingerprint

VARIABLE = "PALETTE_ALEXNET_WEIGHTS"
OFFICIAL = "7be5be79"  # how the SHA-256 of torchvision's alexnet-owt-7be5be79.pth begins: by it, the figure is LPIPS
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from [-1, 1] to what AlexNet was trained on


class Lpips:
    """Pairs of pictures => (B,), 0 for the same.

    Args:
        weights: a state dict of torchvision's AlexNet.

    Raises:
        FileNotFoundError: no such file. ValueError: something else is in it.
    """

    def __init__(self, weights: Path, device: str = "cpu"):
        import torchmetrics

        if not weights.is_file():
            raise FileNotFoundError(f"{weights}, named by {VARIABLE}, is no file: expected torchvision's AlexNet")
        with weights.open("rb") as file:
            official = hashlib.file_digest(file, "sha256").hexdigest().startswith(OFFICIAL)
        self.name = "LPIPS" if official else "LPIPS (other weights)"
        self.device = device
        # numbered as in torchvision
        layers = [
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        ]  # fmt: skip
        network = nn.Sequential(*layers)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(_backbone(state))
        except Exception as error:  # of a file from elsewhere: pickle's own errors among them
            last = str(error).splitlines()[-1].strip()
            raise ValueError(f"{weights} holds no state dict of torchvision's AlexNet: {last}") from error
        network = network.eval().to(device)
        self.stages = [network[a:b] for a, b in ((0, 2), (2, 5), (5, 8), (8, 10), (10, 12))]
        place = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
        heads = torch.load(place, map_location=device, weights_only=True)
        self.heads = [heads[f"lin{i}.model.1.weight"] for i in range(len(self.stages))]
        self.content = fingerprint(network.state_dict(), {str(i): head for i, head in enumerate(self.heads)})

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shift, scale = (torch.tensor(v, device=self.device).reshape(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x = (torch.cat([a, b]).to(self.device).float() - shift) / scale
        total = torch.zeros(len(a), device=self.device)
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            one, other = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()).chunk(2)
            total += F.conv2d((one - other).square(), head).mean((1, 2, 3))
        return total.cpu()


def _backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("features."): v for name, v in state.items() if name.startswith("features.")}


def load_lpips(device: str = "cpu") -> Lpips | None:
    """With AlexNet's weights of the file that PALETTE_ALEXNET_WEIGHTS names; None where it names none."""
    path = os.environ.get(VARIABLE)
    return Lpips(Path(path), device) if path else None
