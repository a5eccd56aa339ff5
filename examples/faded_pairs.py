"""Fifty pairs of a faded and a good photograph, to fine-tune on:  python examples/faded_pairs.py --output pairs

The photographs are CC0 or public domain, from the scikit-image wheel. Two columns, `image` and `faded`, in one
parquet file; pictures of your own go into such a file in the same way, or see the `datasets` documentation.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from skimage import data

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def faded(picture: np.ndarray) -> np.ndarray:
    """Half of the contrast is gone, and the blue dye most of all."""
    return (picture * np.array([0.55, 0.45, 0.25]) + np.array([95, 90, 70])).clip(0, 255).astype(np.uint8)


def crops(number: int, seed: int) -> list[np.ndarray]:
    """Squares of 96 to 300 pixels from the photographs; `seed` 1 shows other places than 0."""
    rng, out = np.random.default_rng(seed), []
    for i in range(number):
        photo = getattr(data, PHOTOS[i % len(PHOTOS)])()[..., :3]
        side = int(rng.integers(96, 300))
        y, x = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
        out.append(np.asarray(Image.fromarray(photo[y : y + side, x : x + side]).resize((96, 96))))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pairs"))
    parser.add_argument("--number", type=int, default=50)
    args = parser.parse_args()
    pictures = crops(args.number, 0)
    columns = {
        "image": [Image.fromarray(p) for p in pictures],
        "faded": [Image.fromarray(faded(p)) for p in pictures],
    }
    features = datasets.Features({name: datasets.Image() for name in columns})
    args.output.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(args.output / "train-0.parquet"))
    print(f"{args.number} pairs in {args.output}")


if __name__ == "__main__":
    main()
