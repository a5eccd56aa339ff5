"""The starter against its goals, from the pictures of a run of `palette evaluate`:

    python benchmarks/goals.py runs/quality --crops PATH/TO/bsds500:40,PATH/TO/imagenet-256

Chroma is that of CIELAB, its mean over all pixels; steps are differences between neighbours, the mean over RGB, across
the border that an uncropping began at and between all other neighbours of that direction. `--crops` also restores JPEGs
of quality 10 from crops of photographs that were held back: the last of a folder, FOLDER:LAST, or its validation
split, FOLDER; its run is kept in `--folder`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from quality import CLASSIFIER
from skimage.color import rgb2lab

from palette_diffusers import PalettePipeline
from palette_diffusers.evaluation import Photographs, evaluate, load_features, load_restorer
from palette_diffusers.evaluation.restorers import from_pipeline
from palette_diffusers.sources import image_column, load_images

SIZE = 64


def chroma(folder: Path) -> float:
    """Of all pictures of a folder, in CIELAB's units."""
    found = [
        np.hypot(*np.moveaxis(rgb2lab(Image.open(path))[..., 1:], -1, 0)).mean()
        for path in sorted(folder.glob("*.png"))
    ]
    return float(np.mean(found))


def border_steps(folder: Path, masks: Path) -> float:
    """How steep pictures are across their masks' borders, over how steep they are elsewhere."""
    at, elsewhere = [], []
    for path in sorted(folder.glob("*.png")):
        picture = np.asarray(Image.open(path), np.float64)
        mask = np.asarray(Image.open(masks / path.name).convert("L")) > 127
        for axis in (0, 1):
            steps, border = np.abs(np.diff(picture, axis=axis)).mean(-1), np.diff(mask, axis=axis)
            if border.any():
                at.append(steps[border].mean())
                elsewhere.append(steps[~border].mean())
    return float(np.mean(at) / np.mean(elsewhere))


def goals(run: Path) -> list[tuple[str, str, str, bool]]:
    """What is asked, what was found, and whether it is met."""
    rows = {(row["task"], row["images"]): row for row in json.loads((run / "results.json").read_text())["rows"]}
    whole = rows["originals", "originals"]["accuracy"]["value"]
    out = []
    for task in ("inpainting", "colorization", "jpeg_restoration"):
        share = rows[task, "Palette"]["frechet"]["value"] / rows[task, "degraded"]["frechet"]["value"]
        out.append((f"{task}: distance of the degraded input's", f"{share:.0%}", "at most 50%", share <= 0.5))
    for task in ("colorization", "inpainting", "uncropping", "jpeg_restoration"):
        before, after = (rows[task, who]["accuracy"]["value"] for who in ("degraded", "Palette"))
        share = (after - before) / (whole - before)
        out.append((f"{task}: accuracy recovered", f"{share:.0%}", "at least 50%", share >= 0.5))
    shares = [chroma(folder) for folder in (run / "colorization/Palette/pictures", run / "originals/pictures")]
    share = shares[0] / shares[1]
    out.append(("colorization: chroma of the originals'", f"{share:.0%}", "85 to 115%", 0.85 <= share <= 1.15))
    pictures, masks = run / "uncropping/Palette/pictures", run / "uncropping/masks"
    share, real = border_steps(pictures, masks), border_steps(run / "originals/pictures", masks)
    found = f"{share:.0%} (originals {real:.0%})"
    out.append(("uncropping: steps across the border of those elsewhere", found, "90 to 110%", 0.9 <= share <= 1.1))
    return out


def crops(sources: str, folder: Path) -> int:
    """Writes every square of 64 pixels, side by side, of the last photographs of some folders; returns how many."""
    count = 0
    for source in sources.split(","):
        path, _, last = source.partition(":")
        rows = load_images(path, "validation") if not last else load_images(path)
        column = image_column(rows)
        for i in range(len(rows) - int(last) if last else 0, len(rows)):
            picture = rows[i][column].convert("RGB")
            for top in range(0, picture.height - SIZE + 1, SIZE):
                for left in range(0, picture.width - SIZE + 1, SIZE):
                    picture.crop((left, top, left + SIZE, top + SIZE)).save(folder / f"{count:05d}.png")
                    count += 1
    return count


def jpeg_goal(sources: str, run: Path) -> tuple[str, str, str, bool]:
    with tempfile.TemporaryDirectory() as name:
        count = crops(sources, Path(name))
        photographs = Photographs(name, SIZE, count)
        restorers = [
            load_restorer("identity", PalettePipeline.from_pretrained),
            from_pipeline(PalettePipeline.from_pretrained()),
        ]
        results = evaluate(restorers, photographs, ["jpeg_restoration"], load_features(CLASSIFIER), run)
    assert results is not None
    found = {row["images"]: row["frechet"]["value"] for row in results["rows"]}
    share = found["Palette"] / found["degraded"]
    text = f"JPEG, quality 10, {count} crops of held-back photographs: distance of the degraded input's"
    return text, f"{share:.0%} ({found['Palette']:.2f}, {found['degraded']:.2f})", "at most 50%", share <= 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of palette evaluate with all four tasks")
    parser.add_argument("--crops", default="", help="folders of photographs, FOLDER or FOLDER:LAST, commas between")
    parser.add_argument("--folder", type=Path, default=Path("runs/crops"), help="of the run on crops")
    args = parser.parse_args()
    rows = goals(args.run) + ([jpeg_goal(args.crops, args.folder)] if args.crops else [])
    print("| what | measured | goal | met |\n| --- | --- | --- | --- |")
    for what, found, goal, met in rows:
        print(f"| {what} | {found} | {goal} | {'yes' if met else 'no'} |")


if __name__ == "__main__":
    main()
