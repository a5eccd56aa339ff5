"""Photographs of any size: cost and memory up to 48 megapixels, tiles, folders, seams.

    python benchmarks/sizes.py --output benchmarks/results/sizes.json

The photographs are scikit-image's public-domain and CC0 ones (astronaut, chelsea, coffee, rocket), larger ones mosaics
of them. Processor seconds, one thread by OMP_NUM_THREADS=1; a part that is in the output file is not run again.
large: the command line, each row in a process of its own; few steps, since time grows with them and memory does not.
hard: the same at 48 megapixels for what takes more memory: many holes, a solver that remembers, variations.
tiling: a 1024-pixel square, and scratches across it, in blended tiles, against that square without any overlap.
folder: 200 small photographs from files to files, against the network's own evaluations alone.
seams: gradients across the borders of tiles and blocks over those near, in the ratio to the same picture's without
them; of the last `--count` photographs of `--data`, a folder of parquet (BSDS500: held back from training), else of the
four.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import machine, output_file
from PIL import Image, ImageDraw

from palette_diffusers import PalettePipeline, folders, sizes

MEGAPIXELS = (0.25, 1, 4, 12, 48)
RUN = """
import sys, time
from palette_diffusers import cli
from palette_diffusers.pipeline import PalettePipeline
network, seconds, pixels = PalettePipeline._predict, 0.0, 0
def timed(self, sample, *rest):
    global seconds, pixels
    begin = time.process_time()
    out = network(self, sample, *rest)
    seconds, pixels = seconds + time.process_time() - begin, pixels + sample[:, 0].numel()
    return out
PalettePipeline._predict = timed
begin = time.process_time()
try:
    cli.app(sys.argv[1:])
except SystemExit as end:
    if end.code:
        raise
status = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # not ru_maxrss, which is inherited
print(int(status) / 2**20, time.process_time() - begin, seconds, pixels / 1e6)
"""


def photographs() -> dict[str, np.ndarray]:
    from skimage import data

    return {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}


def mosaic(width: int, height: int) -> Image.Image:
    cells, out = [photo[:300, :448] for photo in photographs().values()], np.zeros((height, width, 3), np.uint8)
    for i, y in enumerate(range(0, height, 300)):
        for j, x in enumerate(range(0, width, 448)):
            cell = cells[(3 * i + j) % 4][:, :: -1 if (i * j) % 3 == 1 else 1]
            out[y : y + 300, x : x + 448] = cell[: height - y, : width - x]
    return Image.fromarray(out)


def command(arguments: list[str], megapixels: float) -> dict:
    """`palette` with these arguments, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, "--dtype", "float32"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    memory, seconds, network, evaluated = map(float, done.stdout.split()[-4:])
    return {
        "peak GiB": round(memory, 2), "seconds": round(seconds, 1), "network seconds": round(network, 1),
        "megapixels evaluated": round(evaluated, 2), "seconds a megapixel": round(seconds / megapixels, 2),
    }  # fmt: skip


def sides(megapixels: float) -> tuple[int, int]:
    """Width and height, 4 to 3."""
    return round((megapixels * 4e6 / 3) ** 0.5), round((megapixels * 3e6 / 4) ** 0.5)


def large(rows: list[dict], keep: Callable) -> None:
    """The hole is 10% of the picture; a quarter of an uncropping's result is new, on the right."""
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in reversed(MEGAPIXELS):
            width, height = sides(megapixels)
            side = [round(length * 0.1**0.5) for length in (width, height)]
            box = [width // 4, height // 4, width // 4 + side[0], height // 4 + side[1]]
            jobs = {
                "uncropping": ("uncrop", width * 3 // 4, ["--right", str(width - width * 3 // 4), "--steps", "2"]),
                "inpainting": ("inpaint", width, ["--mask", ",".join(map(str, box)), "--steps", "2"]),
                "jpeg_restoration": ("restore", width, ["--steps", "1"]),
                "colorization": ("colorize", width, []),
            }
            for task, (verb, across, options) in jobs.items():
                if any(row["task"] == task and row["megapixels"] == megapixels for row in rows):
                    continue
                source = Path(folder, "photo.jpg")
                mosaic(across, height).save(source, quality=10 if verb == "restore" else 95)
                steps = int(options[-1]) if "--steps" in options else 8
                found = command([verb, str(source), "-o", f"{folder}/out.png", *options], megapixels)
                rows.append({"task": task, "megapixels": megapixels, "steps": steps, **found})
                keep(rows[-1])


def hard(rows: list[dict], keep: Callable, megapixels: float = 48) -> None:
    """40 holes of 100x100 pixels that lie apart; 4 variations; a solver that remembers what it predicted before."""
    with tempfile.TemporaryDirectory() as folder:
        width, height = sides(megapixels)
        photo, mask, out = (str(Path(folder, name)) for name in ("photo.jpg", "mask.png", "out.png"))
        holes = Image.new("L", (width, height))
        for i in range(40):
            x, y = (i % 8 + 0.5) * width / 8, (i // 8 + 0.5) * height / 5
            holes.paste(255, (round(x), round(y), round(x) + 100, round(y) + 100))
        holes.save(mask)
        box = f"{width // 4},{height // 4},{width // 4 + 400},{height // 4 + 400}"
        jobs = {
            "40 holes": ["inpaint", "--mask", mask, "--steps", "2"],
            "a hole of 400x400, 4 variations": ["inpaint", "--mask", box, "--samples", "4"],
            "colorization, 4 variations": ["colorize", "--samples", "4"],
            "a border of 400, --speed fast": ["uncrop", "--right", "400", "--speed", "fast"],
        }
        for name, (verb, *options) in jobs.items():
            if any(row["what"] == name for row in rows):
                continue
            mosaic(width - 400 if verb == "uncrop" else width, height).save(photo, quality=95)
            found = command([verb, photo, "-o", out, "--overwrite", *options], megapixels)
            rows.append({"what": name, "megapixels": megapixels, **found})
            keep(rows[-1])


def seconds(call: Callable, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return float(np.median(times))


def scratches(height: int, width: int) -> torch.Tensor:
    """Eight lines of 3 pixels from edge to edge, as a mask (1, 1, H, W)."""
    mask, rng = Image.new("L", (width, height)), np.random.default_rng(0)
    for x, y in rng.random((8, 2)):
        ImageDraw.Draw(mask).line([(x * width, 0), (y * width, height)], 255, 3)
    return torch.from_numpy(np.asarray(mask) / 255).float()[None, None].ceil()


def tiling(pipe: PalettePipeline) -> dict:
    gamma, multiple = torch.tensor(0.5), pipe.unet.size_multiple
    sample, condition = torch.rand(1, 3, 1024, 1024), torch.rand(1, 4, 1024, 1024)
    everywhere, out = torch.ones(1, 1, 1024, 1024), {}
    lines = scratches(1024, 1024)
    jobs = {
        "all of it (JPEG restoration, large holes)": (everywhere, 128),
        "scratches": (lines, sizes.cheapest_tile(lines, 64, multiple, 16)),
        "all of it, in the tiles that scratches get": (everywhere, 64),
    }
    for name, (where, tile) in jobs.items():
        batch = 32 * 64 * 64 // tile**2
        parts = [
            x.unfold(2, tile, tile).unfold(3, tile, tile).permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], tile, tile)
            for x in (sample, condition)
        ]
        tiled = sizes.tiled(pipe._predict, tile, 16, where=where)
        with torch.no_grad():
            tiles = seconds(lambda tiled=tiled: tiled(sample, gamma, condition))
            alone = seconds(lambda parts=parts, batch=batch: [
                pipe._predict(a, gamma, b) for a, b in zip(*(x.split(batch) for x in parts), strict=True)
            ])  # fmt: skip
        out[name] = {"tile": tile, "seconds": round(tiles, 2), "the picture without overlap": round(alone, 2),
                     "overhead": round(tiles / alone - 1, 3)}  # fmt: skip
    return out


def folder(pipe: PalettePipeline, count: int = 200) -> dict:
    """Wall-clock seconds: files are read and written beside the network."""
    rng, photos = np.random.default_rng(0), list(photographs().values())
    with tempfile.TemporaryDirectory() as root:
        source, target = Path(root, "in"), Path(root, "out")
        source.mkdir()
        for i in range(count):
            photo = photos[i % 4]
            y, x = rng.integers(0, photo.shape[0] - 192), rng.integers(0, photo.shape[1] - 256)
            Image.fromarray(photo[y : y + 192, x : x + 256]).save(source / f"{i}.jpg", quality=90)

        def restore(jobs: list, pictures: list, masks: list | None) -> list:
            generators = [torch.Generator().manual_seed(0) for _ in jobs]
            return pipe(pictures, task="colorization", generator=generators).images

        shares, times, network, spent = [], [], pipe._predict, 0.0

        def timed(*given: torch.Tensor) -> torch.Tensor:
            nonlocal spent
            begin = time.perf_counter()
            out = network(*given)
            spent += time.perf_counter() - begin
            return out

        pipe._predict = timed  # type: ignore[method-assign]
        for _ in range(3):
            spent, begin = 0.0, time.perf_counter()
            folders.run(folders.plan(source, target), restore, overwrite=True)
            times.append(time.perf_counter() - begin)
            shares.append(spent / times[-1])
        del pipe._predict
    return {"photographs": count, "size": "256x192", "seconds": round(float(np.median(times)), 2),
            "photographs a second": round(count / float(np.median(times)), 2),
            "share of the network's own batched speed": round(float(np.median(shares)), 3)}  # fmt: skip


def steps_at(image: np.ndarray, borders: list[set[int]], inside: tuple[slice, slice]) -> np.ndarray:
    """Sums of differences of neighbours (H, W, 3): across `borders` (of rows, of columns; the first pixel beyond), and
    their mean across the lines 8 before and after, where JPEG's blocks and the patches have the same phase."""
    total = np.zeros(2)
    for axis, lines in enumerate(borders):
        change = np.abs(np.diff(image.astype(float), axis=axis)).mean(-1)
        first, last = inside[axis].start + 1, inside[axis].stop - 1
        each = change[:, inside[1]].sum(1) if axis == 0 else change[inside[0]].sum(0)
        for line in lines & set(range(first, last + 1)):
            near = [each[n - 1] for n in (line - 8, line + 8) if first <= n <= last and n not in lines]
            total += (each[line - 1], np.mean(near)) if near else 0
    return total


def lines(length: int, tile: int, first: int = 0) -> set[int]:
    """Where tiles start and end."""
    starts = [start for start, _ in sizes.tile_places(length, 1, tile, 16)]
    return {first + line for start in starts for line in (start, start + tile) if 0 < line < length}


def edges(firsts: Iterable[tuple[int, int]], length: int) -> set[int]:
    """Where blocks (first, number) start and end."""
    return {line for first, number in firsts for line in (first, first + number) if 0 < line < length}


def seams(pipe: PalettePipeline, photos: list[np.ndarray]) -> dict:
    """JPEG at quality 10, in tiles, and in blocks of about 272 pixels; holes of a quarter; borders of a third.

    Each picture is made again, from the same noise, without what is measured: without tiles, or in one block. What a
    place's own texture is, and the grid of the network's patches, is then in both: their ratio is the seam."""
    usual, real, chosen = sizes.BLOCK, sizes.tiled, [0]

    def recorded(predict: Callable, tile: int, *rest: Any, **more: Any) -> Callable:
        chosen[0] = tile
        return real(predict, tile, *rest, **more)

    def made(*given: Any, tiles: bool = True, block: int = usual, **options: Any) -> np.ndarray:
        sizes.BLOCK, sizes.tiled = block, recorded if tiles else lambda predict, *rest, **more: predict
        try:
            return np.asarray(pipe(*given, generator=torch.Generator().manual_seed(0), **options).images[0])
        finally:
            sizes.BLOCK, sizes.tiled = usual, real

    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str, image: np.ndarray, other: np.ndarray, *where: Any) -> None:
        found.setdefault(name, []).append(np.concatenate([steps_at(x, *where) for x in (image, other)]))
        print(name, len(found[name]), ratio(found[name][-1:]), flush=True)

    def ratio(rows: Any) -> float:
        at, near, at_other, near_other = np.sum(rows, axis=0)
        return round(float(at / near / (at_other / near_other)), 3)

    for photo in photos:
        height, width = photo.shape[:2]
        everywhere = (slice(0, height), slice(0, width))
        with tempfile.TemporaryDirectory() as root:
            Image.fromarray(photo).save(f"{root}/a.jpg", quality=10)
            jpeg = dict(task="jpeg_restoration")
            image = made(f"{root}/a.jpg", **jpeg)
            borders = [lines(height, chosen[0]), lines(width, chosen[0])]
            keep("JPEG, tiles", image, made(f"{root}/a.jpg", tiles=False, **jpeg), borders, everywhere)
            in_blocks = made(f"{root}/a.jpg", block=272, **jpeg)
        sizes.BLOCK = 272
        views = sizes.blocks(height, width, 16)
        sizes.BLOCK = usual
        borders = [edges(((v.top, v.height) for v in views), height), edges(((v.left, v.width) for v in views), width)]
        keep("JPEG, blocks", in_blocks, image, borders, everywhere)

        box = (height // 4, width // 4, height * 3 // 4, width * 3 // 4)
        mask, grown, known = torch.zeros(1, 1, height, width), torch.zeros(1, 1, height, width), width - width // 3
        mask[..., box[0] : box[2], box[1] : box[3]] = 1
        grown[..., known:] = 1
        jobs: dict[str, tuple] = {
            "inpainting": (photo, {"mask_image": mask}, mask, (slice(box[0], box[2]), slice(box[1], box[3]))),
            "uncropping": (photo[:, :known], {"right": width - known}, grown, (everywhere[0], slice(known + 1, width))),
        }
        for name, (given, options, hole, inside) in jobs.items():
            image, whole = (made(given, task=name, tiles=tiles, **options) for tiles in (True, False))
            view = sizes.hole_view(hole, 64, pipe.unet.size_multiple)
            borders = [lines(view.height, chosen[0], view.top), lines(view.width, chosen[0], view.left)]
            keep(name, image, whole, borders, inside)
    out: dict[str, Any] = {"photographs": len(photos)}
    for name, rows in found.items():
        again = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
        interval = [round(float(x), 3) for x in np.percentile([ratio(np.array(rows)[i]) for i in again], (2.5, 97.5))]
        without = np.sum(rows, axis=0)[2:]
        out[name] = {"ratio": ratio(rows), "95%": interval, "without, alone": round(float(without[0] / without[1]), 3)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="large,hard,tiling,folder,seams", help="which parts, comma-separated")
    parser.add_argument("--data", default=None, help="folder of parquet with the column image, for seams")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--output", type=output_file, required=True, help="JSON file")
    args = parser.parse_args()

    def photos() -> list[np.ndarray]:
        if args.data is None:
            return list(photographs().values())
        import datasets

        data = datasets.load_dataset("parquet", data_files={"train": f"{args.data}/*.parquet"}, split="train")
        return [
            np.asarray(row["image"].convert("RGB")) for row in data.select(range(len(data) - args.count, len(data)))
        ]

    tables: dict[str, Callable] = {"large": large, "hard": hard}
    parts = {"tiling": tiling, "folder": folder, "seams": lambda pipe: seams(pipe, photos())}
    if unknown := set(args.only.split(",")) - {*tables, *parts}:
        parser.error(f"--only has {', '.join(unknown)}, expected some of {', '.join([*tables, *parts])}")
    result = json.loads(args.output.read_text()) if args.output.exists() else {"machine": machine()}

    def keep(row: object) -> None:
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")

    for name in args.only.split(","):
        if name in tables:
            tables[name](result.setdefault(name, []), keep)
        elif name not in result:
            pipe = PalettePipeline.from_pretrained()
            pipe.set_progress_bar_config(disable=True)
            result[name] = parts[name](pipe)
            keep(result[name])


if __name__ == "__main__":
    main()
