"""Borders and holes of whole photographs, with and without the texture of their surroundings:

    python benchmarks/texture.py --data PATH/TO/bsds500 --count 40 --output benchmarks/results/texture.json

Photographs of the end of the data, which the starter was not trained on. The right 96 columns are made anew
(uncropping), or a rectangle of a quarter (inpainting). FD: the Frechet distance of the classifier's features over
64-pixel patches that lie in what is new, smaller is better; PSNR there in dB; processor seconds a photograph.
"""

import json
import time

import numpy as np
import torch
from classifier import load_classifier
from jpeg import options, patches, prepared, psnr
from peers import machine
from PIL import Image

from palette_diffusers import PalettePipeline, canvas
from palette_diffusers.evaluation import frechet_distance
from palette_diffusers.files import write_text

BORDER, STRIDE = 96, 32
KINDS = {"without": False, "with": True}


def new_area(task: str, photo: Image.Image) -> tuple[int, int, int, int]:
    """What is made anew: left, top, right, bottom."""
    width, height = photo.size
    if task == "uncropping":
        return width - BORDER, 0, width, height
    return width // 4, height // 4, width // 4 + width // 2, height // 4 + height // 2


def make(pipe: PalettePipeline, task: str, photo: Image.Image, texture: bool) -> torch.Tensor:
    """(3, H, W), of seed 0."""
    given: dict = dict(texture=texture, generator=torch.Generator().manual_seed(0), output_type="pt", task=task)
    if task == "uncropping":
        return pipe(photo.crop((0, 0, photo.width - BORDER, photo.height)), right=BORDER, **given).images[0]
    return pipe(photo, mask_image=",".join(map(str, new_area(task, photo))), **given).images[0]


def main() -> None:
    parser = options(__doc__, "bfloat16")
    parser.add_argument("--tasks", default="uncropping,inpainting")
    args = parser.parse_args()
    photographs, pipe = prepared(parser, args)
    classifier, tasks = load_classifier(), {}
    for task in args.tasks.split(","):
        cut: dict[str, list[torch.Tensor]] = {kind: [] for kind in ("original", *KINDS)}
        figures: dict[str, dict[str, list[float]]] = {kind: {"PSNR": [], "seconds": []} for kind in KINDS}
        for row in photographs:
            photo = row["image"].convert("RGB")
            left, top, right, bottom = new_area(task, photo)
            pictures = {"original": canvas.read(photo).image[0]}
            for kind, texture in KINDS.items():
                begin = time.process_time()
                pictures[kind] = make(pipe, task, photo, texture)
                figures[kind]["seconds"].append(time.process_time() - begin)
            here = {kind: picture[:, top:bottom, left:right] for kind, picture in pictures.items()}
            for kind, picture in here.items():
                cut[kind].append(patches(picture[None], STRIDE))
            for kind in KINDS:
                figures[kind]["PSNR"].append(psnr(here[kind], here["original"]))
        with torch.no_grad():
            features = {kind: classifier.features(torch.cat(each)) for kind, each in cut.items()}
        tasks[task] = {"patches": len(features["original"])} | {
            kind: {"FD": round(frechet_distance(features[kind], features["original"]), 3)}
            | {name: round(float(np.median(values)), 3) for name, values in figures[kind].items()}
            for kind in KINDS
        }
        print(task, json.dumps(tasks[task]), flush=True)
    if args.output:
        result = {"machine": machine(), "photographs": args.count, "tasks": tasks}
        write_text(args.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
