"""What measuring costs, beside sampling, and what half precision does to a figure.

python benchmarks/evaluation.py --data PATH/TO/tiny-imagenet
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import peak_memory

from palette_diffusers import PalettePipeline
from palette_diffusers.evaluation import Photographs, load_features, metrics
from palette_diffusers.evaluation.features import FeatureNetwork
from palette_diffusers.evaluation.inputs import Batch, degrade
from palette_diffusers.evaluation.restorers import from_pipeline
from palette_diffusers.evaluation.store import Store
from palette_diffusers.machine import best_dtype
from palette_diffusers.tasks import Given

CLASSIFIER = f"{Path(__file__).with_name('classifier.py')}:load_classifier"


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Processor seconds, the least of some rounds."""
    work()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def stream(count: int, rows: int = 500) -> tuple[float, float]:
    """Peak MiB of this process so far, and after a Frechet distance over `count` stored features of 224."""
    before = peak_memory() * 1024
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), count // rows)
        for index in range(store.number):
            store.write(index, {"features": torch.randn(rows, 224)})
        metrics.Frechet(metrics.Moments.of(store.stream("features")))
    return before, peak_memory() * 1024


def peaks_of_streaming(count: int) -> tuple[float, float]:
    """`stream` in a process of its own, whose peak before is that of its imports."""
    code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import evaluation; "
    command = [sys.executable, "-c", code + f"print(json.dumps(evaluation.stream({count})))"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"streaming {count} features ended with {done.returncode}: {done.stderr[-500:]}")
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def figures_of(
    network: FeatureNetwork, images: torch.Tensor, originals: torch.Tensor, labels: list[int], batch: int
) -> dict[str, float]:
    """The network's figures of pictures (N, 3, H, W)."""
    (a, logits), (b, _) = (
        [torch.cat(parts) for parts in zip(*map(network, x.split(batch)), strict=True)] for x in (images, originals)
    )
    middle = len(a) // 2  # a picture and its own original are not compared by the kernel
    (score,) = metrics.inception_scores([logits])
    return {
        "FD-classifier": metrics.frechet_distance(a, b),
        "KD-classifier": metrics.kernel_distance(a[:middle], b[middle : 2 * middle]),
        "score-classifier": score,
        "accuracy": (logits.argmax(1) == torch.tensor(labels)).float().mean().item(),
        "distance-classifier": (a - b).norm(dim=1).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()

    photographs = Photographs(args.data, 64, 400)
    clean = photographs.batch(range(args.batch))
    network = load_features(CLASSIFIER)
    given = Given.cat([degrade("colorization", one, i) for i, one in enumerate(clean.split(1))])
    batch = Batch("colorization", [str(i) for i in range(args.batch)], given, list(range(args.batch)))
    palette = from_pipeline(PalettePipeline.from_pretrained(dtype=best_dtype("cpu")))
    sampling = seconds(lambda: palette(batch), 2)
    images = palette(batch)

    @torch.no_grad()
    def alone() -> None:
        network.extract(clean)

    def figures() -> None:
        metrics.psnr(images, clean)
        metrics.ssim(images, clean)

    bare, wrapped, figure = seconds(alone), seconds(lambda: network(clean)), seconds(figures)
    print(f"features: {bare / wrapped:.1%} of the network's own speed")
    print(f"features {wrapped / sampling:.1%}, PSNR and SSIM {figure / sampling:.1%} of the time of sampling (8 steps)")

    everything = photographs.batch(range(400))
    degraded = torch.cat([degrade("jpeg_restoration", one, i).known for i, one in enumerate(everything.split(1))])
    whole, half = (
        figures_of(load_features(CLASSIFIER, dtype=dtype), degraded, everything, photographs.labels, args.batch)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name, value in whole.items():
        change = (half[name] - value) / abs(value)
        print(f"{name} of JPEGs, network in float32 and bfloat16: {value:.5g}, {half[name]:.5g} ({change:+.2%})")
    for count in (5_000, 50_000):
        before, after = peaks_of_streaming(count)
        print(f"{count} images streamed: peak {after:.0f} MiB, of the imports alone {before:.0f} MiB")


if __name__ == "__main__":
    main()
