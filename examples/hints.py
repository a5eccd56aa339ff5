"""Colour hints: strokes on a gray photograph, the result without and with them:  python examples/hints.py --output FILE

The photograph is a cup of coffee (CC0), from scikit-image.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from skimage import data

from palette_diffusers import PalettePipeline, canvas

STROKES = {
    "#c83c32": [(0.44, 0.87, 0.57, 0.9), (0.25, 0.55, 0.27, 0.65), (0.75, 0.5, 0.74, 0.6)],
    "#96602c": [(0.08, 0.35, 0.12, 0.8), (0.85, 0.2, 0.9, 0.7), (0.3, 0.1, 0.42, 0.03)],
    "#a05a1e": [(0.42, 0.35, 0.52, 0.36)],
}


def strokes(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGBA", size)
    draw = ImageDraw.Draw(image)
    for color, lines in STROKES.items():
        for x, y, x2, y2 in lines:
            draw.line([x * size[0], y * size[1], x2 * size[0], y2 * size[1]], fill=color, width=size[0] // 60)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hints.jpg"))
    args = parser.parse_args()
    photo = Image.fromarray(data.coffee()).convert("L")
    hints = strokes(photo.size)
    pipe = PalettePipeline.from_pretrained()
    free, held = (pipe(photo, hints=h, generator=torch.Generator().manual_seed(0)).images[0] for h in (None, hints))
    shown = photo.convert("RGB")
    shown.paste(hints, mask=hints)
    out = Image.new("RGB", (3 * photo.width + 20, photo.height), "white")
    for i, picture in enumerate((shown, free, held)):
        out.paste(picture, (i * (photo.width + 10), 0))
    out.thumbnail((1200, 1200), Image.Resampling.LANCZOS)
    canvas.save(out, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
