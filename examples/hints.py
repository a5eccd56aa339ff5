"""Colour hints: strokes on a gray photograph, the result without and with them:  python examples/hints.py --output FILE

The photograph is a cup of coffee (CC0), from scikit-image.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from skimage import data

from palette_diffusers import PalettePipeline, canvas

Lines = list[tuple[float, float, float, float]]
# of each photograph, by colour: lines from (x, y) to (x, y), in shares of its width and height
STROKES: dict[str, dict[str, Lines]] = {
    "astronaut": {
        "#d2552d": [(0.3, 0.62, 0.42, 0.75), (0.6, 0.7, 0.66, 0.62), (0.25, 0.85, 0.3, 0.97)],
        "#d9a184": [(0.42, 0.2, 0.5, 0.22), (0.44, 0.28, 0.47, 0.28)],
        "#6e5132": [(0.4, 0.08, 0.5, 0.06)],
        "#9c3a40": [(0.06, 0.3, 0.08, 0.5)],
        "#262d52": [(0.03, 0.05, 0.05, 0.12)],
        "#b9b0a4": [
            (0.6, 0.08, 0.62, 0.35), (0.2, 0.1, 0.26, 0.3), (0.88, 0.08, 0.92, 0.4), (0.66, 0.38, 0.7, 0.5),
            (0.19, 0.33, 0.215, 0.4), (0.14, 0.24, 0.16, 0.32), (0.08, 0.38, 0.1, 0.44), (0.03, 0.7, 0.05, 0.8),
        ],
        "#3a3634": [(0.78, 0.6, 0.95, 0.6), (0.66, 0.8, 0.82, 0.95), (0.27, 0.37, 0.32, 0.46)],
    },
    "chelsea": {
        "#a5774f": [(0.3, 0.2, 0.42, 0.1), (0.2, 0.55, 0.3, 0.6), (0.62, 0.5, 0.68, 0.62)],
        "#989a62": [(0.36, 0.42, 0.38, 0.42), (0.68, 0.42, 0.7, 0.42)],
        "#b5604a": [(0.57, 0.82, 0.59, 0.82)],
        "#bfa9a5": [(0.85, 0.2, 0.95, 0.25), (0.85, 0.6, 0.95, 0.7), (0.03, 0.2, 0.05, 0.3)],
    },
    "coffee": {
        "#b4392a": [(0.44, 0.87, 0.57, 0.9), (0.25, 0.55, 0.27, 0.65), (0.75, 0.5, 0.74, 0.6)],
        "#96602c": [
            (0.05, 0.35, 0.08, 0.8), (0.85, 0.2, 0.9, 0.7), (0.3, 0.1, 0.42, 0.03), (0.75, 0.05, 0.95, 0.08),
            (0.05, 0.93, 0.35, 0.97), (0.75, 0.93, 0.95, 0.9),
        ],
        "#a05a1e": [(0.42, 0.35, 0.52, 0.36)],
        "#b9aea6": [(0.6, 0.7, 0.63, 0.75), (0.69, 0.2, 0.68, 0.25)],
        "#efe6dc": [(0.32, 0.15, 0.33, 0.28), (0.63, 0.2, 0.635, 0.3), (0.4, 0.48, 0.52, 0.495)],
    },
    "rocket": {
        "#243a6e": [(0.2, 0.1, 0.4, 0.12), (0.6, 0.1, 0.85, 0.12), (0.33, 0.6, 0.42, 0.6), (0.6, 0.6, 0.68, 0.6)],
        "#2a2c3a": [(0.3, 0.88, 0.38, 0.88), (0.65, 0.88, 0.8, 0.88)],
        "#d8d0c0": [(0.5, 0.45, 0.5, 0.8)],
    },
}  # fmt: skip


def strokes(name: str, size: tuple[int, int]) -> Image.Image:
    """Those of a photograph, drawn on a transparent picture."""
    image = Image.new("RGBA", size)
    draw = ImageDraw.Draw(image)
    for color, lines in STROKES[name].items():
        for x, y, x2, y2 in lines:
            ends = (x * size[0], y * size[1], x2 * size[0], y2 * size[1])
            draw.line(ends, fill=color, width=max(3, size[0] // 60))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hints.jpg"))
    args = parser.parse_args()
    photo = Image.fromarray(data.coffee()).convert("L")
    hints = strokes("coffee", photo.size)
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
