"""A small 64-pixel image classifier, whose features measure quality where Inception is not at hand.

A distance in these features is never called FID: the tables name this network.

    python benchmarks/classifier.py --data PATH/TO/tiny-imagenet --epochs 10

Images are (B, 3, 64, 64), RGB, [-1, 1].
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
CLASSES = 200


class Block(nn.Module):
    """Pre-activation residual block: (B, C, H, W) => (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(h)
        h = self.conv1(h)
        return skip + self.conv2(F.relu(self.norm2(h)))


class Classifier(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] => logits (B, 200); `features` gives (B, 224)."""

    def __init__(self, widths: tuple[int, ...] = (32, 96, 224), depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(12, widths[0], 3, 1, 1, bias=False)
        blocks, channels = [Block(widths[0], widths[0], 1)], widths[0]
        for width in widths[1:]:
            blocks += [Block(channels, width, 2)] + [Block(width, width, 1) for _ in range(depth - 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.stem(F.pixel_unshuffle(images, 2)))
        return F.relu(self.norm(h)).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def load_classifier(path: str | Path = WEIGHTS) -> Classifier:
    """The trained network in float32, in evaluation mode."""
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def read(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All photographs of a split: uint8 (N, 3, 64, 64) and labels (N,)."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=sorted(map(str, data.glob(f"{split}-*.parquet"))), split="train")
    images = np.stack([np.asarray(row.convert("RGB")) for row in rows["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])


def augment(images: torch.Tensor, shift: int = 6) -> torch.Tensor:
    """Flips half of the pictures and shifts each by up to `shift` pixels: uint8 => float in [-1, 1]."""
    padded = F.pad(images.float() / 127.5 - 1, [shift] * 4, mode="reflect")
    size = images.shape[-1]
    out = []
    for picture in padded:
        y, x = torch.randint(0, 2 * shift + 1, (2,)).tolist()
        picture = picture[:, y : y + size, x : x + size]
        out.append(picture.flip(2) if torch.rand(()) < 0.5 else picture)
    return torch.stack(out)


@torch.no_grad()
def accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in [0, 1], flips averaged."""
    model.eval()
    hits = 0
    for i in range(0, len(images), 250):
        batch = images[i : i + 250].float() / 127.5 - 1
        hits += ((model(batch) + model(batch.flip(3))).argmax(1) == labels[i : i + 250]).sum().item()
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and validation-*.parquet")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.2, help="highest learning rate")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    from safetensors.torch import save_file

    torch.manual_seed(0)
    images, labels = read(args.data, "train")
    model = Classifier().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(images)} photographs", flush=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * (len(images) // args.batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=steps + 1, pct_start=0.2)
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(images))[: len(images) // args.batch * args.batch].split(args.batch):
            batch = augment(images[index]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss is {loss.item()} in epoch {epoch}: lower --rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / (steps // args.epochs):.3f}, {time.time() - start:.0f} s", flush=True)
    result = accuracy(model, *read(args.data, "validation"))
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    about = {"accuracy": result, "epochs": args.epochs, "seconds": round(time.time() - start)}
    part = args.output.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, part, metadata={"about": json.dumps(about)})
    os.replace(part, args.output)
    print(f"top-1 accuracy on the validation photographs: {result:.1%}")


if __name__ == "__main__":
    main()
