"""The main job on real photographs with the shipped checkpoint:  python examples/demo.py --output outputs

The photographs are public domain or CC0. With scikit-image come the astronaut (NASA), the cat Chelsea, a cup of coffee
and a rocket; with this package, and named in its folder `photographs`, the others.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hints import strokes
from PIL import Image, ImageDraw

import palette_diffusers
from palette_diffusers import PalettePipeline, canvas
from palette_diffusers.machine import best_device, best_dtype

SCIKIT = ("astronaut", "chelsea", "coffee", "rocket")
# what each job is shown on; nobody can see in a gray photograph that a cup was red: things get strokes, scenes none
JOBS = {
    "colorization": ("cameraman-gray", "canyon", "pier"),
    "colorization with strokes": SCIKIT,
    "inpainting": ("astronaut", "cliff", "cameraman-gray"),
    "uncropping": ("chelsea", "cliff", "canyon", "tulips"),
    "jpeg_restoration": ("astronaut", "canyon", "earth", "pier"),
}
# what is taken out of a picture: left, top, right, bottom, in shares of its width and height
REMOVED = {
    "astronaut": [(0.25, 0.67, 0.43, 0.85), (0.53, 0.65, 0.66, 0.76)],
    "cliff": [(0.58, 0.0, 0.74, 0.1)],
    "cameraman-gray": [(0.77, 0.19, 0.99, 0.41)],
}


def photograph(name: str) -> Image.Image:
    from skimage import data

    path = Path(palette_diffusers.__file__).with_name("photographs") / f"{name}.jpg"
    return (Image.fromarray(getattr(data, name)()) if name in SCIKIT else Image.open(path)).convert("RGB")


def job_of(job: str, name: str, photo: Image.Image, folder: Path) -> tuple[Any, dict[str, Any], Image.Image]:
    """What the pipeline is given, by which options, and what of it the sheet shows."""
    if job == "inpainting":
        hole, mask = with_hole(name, photo)
        return hole, {"mask_image": mask}, hole
    if job == "uncropping":
        return photo, {"right": 0.12}, photo
    if job == "jpeg_restoration":
        path = folder / f"{name}-quality-10.jpg"
        photo.save(path, quality=10)
        return path, {}, Image.open(path).convert("RGB")
    gray = photo.convert("L")
    shown = gray.convert("RGB")
    if job == "colorization":
        return gray, {}, shown
    colors = strokes(name, photo.size)
    shown.paste(colors, mask=colors)
    return gray, {"hints": colors}, shown


def with_hole(name: str, photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture without what is to be removed, and the mask of it (white = generate)."""
    width, height = photo.size
    mask = Image.new("L", photo.size)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in REMOVED[name]:
        corners = (left * width, top * height, right * width, bottom * height)
        draw.rounded_rectangle(corners, radius=width // 50, fill=255)
    shown = photo.copy()
    shown.paste((128, 128, 128), mask=mask)
    return shown, mask


def sheet(rows: list[tuple[str, list[Image.Image]]], height: int = 200) -> Image.Image:
    """Rows of input and result beside each other, with the row's name."""
    scaled = [(name, [p.resize((round(p.width * height / p.height), height)) for p in row]) for name, row in rows]
    width = max(sum(p.width + 6 for p in row) for _, row in scaled)
    out = Image.new("RGB", (width, len(rows) * (height + 22)), "white")
    draw = ImageDraw.Draw(out)
    for i, (name, row) in enumerate(scaled):
        draw.text((4, i * (height + 22) + 5), name, fill="black")
        x = 0
        for picture in row:
            out.paste(picture, (x, i * (height + 22) + 20))
            x += picture.width + 6
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--steps", type=int, default=None)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    device = best_device()
    pipe = PalettePipeline.from_pretrained(args.model, dtype=best_dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[str, list[Image.Image]]] = []
    for job, names in JOBS.items():
        row: list[Image.Image] = []
        for name in names:
            image, options, shown = job_of(job, name, photograph(name), args.output)
            begin, seeded = time.time(), {"generator": torch.Generator().manual_seed(0)}
            result = pipe(image, task=job.split()[0], num_inference_steps=args.steps, **seeded, **options).images[0]
            path = args.output / f"{name}-{job.replace(' ', '-')}.png"
            canvas.save(result, path)
            print(f"{path}  {result.width}x{result.height}  {time.time() - begin:.1f} s", flush=True)
            row += [shown, result.convert("RGB")]
            if job == "inpainting":
                kept = np.asarray(options["mask_image"]) == 0
                assert np.array_equal(np.asarray(result)[kept], np.asarray(image)[kept]), "known pixels changed"
        rows.append((f"{job}: input, result", row))
    canvas.save(sheet(rows), args.output / "contact-sheet.png")
    print(args.output / "contact-sheet.png")


if __name__ == "__main__":
    main()
