"""Hours of work in one process: memory, open files and temporary files must stay flat.

    python -m torture.soak --minutes 60

Colorizes, fills, extends and restores photographs of changing sizes through the folder's code, and trains in short
runs. After a third of the time as warm-up, nothing may grow by more than 5% and 30 MiB, or by 3 files.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from palette_diffusers import folders
from palette_diffusers.training import preset, train
from torture.files import noise
from torture.surfaces import TASKS, _memory, toy_pipe

OUTPUT = Path("outputs/torture")


def state(temporary: Path) -> dict[str, int]:
    gc.collect()
    return {"bytes": _memory("VmRSS"), "handles": len(os.listdir("/proc/self/fd")), "files": len(os.listdir(temporary))}


def folder_work(place: Path, number: int) -> int:
    """A folder of photographs of new sizes by one task; how many."""
    task = TASKS[number % len(TASKS)]
    (place / "album").mkdir(parents=True)
    for i in range(8):
        size = 40 + (number * 7 + i * 13) % 200, 40 + (number * 11 + i * 17) % 200
        Image.fromarray(noise(*size, 3, number + i)).save(place / "album" / f"{i}.png")
    options = {"inpainting": {"mask_image": ["5,5,30,30"] * 8}, "uncropping": {"right": 0.3}}.get(task, {})

    def restore(jobs: list, pictures: list, masks: list | None) -> list:
        return toy_pipe(bool(number % 2))(pictures, task=task, **options).images

    report = folders.run(folders.plan(place / "album", place / "out"), restore)
    assert report.done == 8 and not report.failed, report
    return report.done


def training(place: Path, number: int) -> int:
    """A short run, begun and ended; its steps."""
    from tests.conftest import toy_unet

    (place / "album").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(noise(40, 40, 3, 6 * i + 2)).save(place / "album" / f"{i}.png")
    unet = {k: list(v) if isinstance(v, tuple) else v for k, v in toy_unet().config.items() if not k.startswith("_")}
    train(replace(
        preset("starter-64"), data=str(place / "album"), output=str(place / "run"), size=32, batch=4, steps=20,
        workers=0, save_every=10, log_every=20, validate_every=0, unet=unet, tracker="none", seed=number,
    ))  # fmt: skip
    return 20


def soak(name: str, work: Callable[[Path, int], int], minutes: float) -> dict[str, object]:
    begin, number, done, first = time.monotonic(), 0, 0, None
    with tempfile.TemporaryDirectory() as root:
        temporary = Path(root) / "tmp"
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
        while time.monotonic() - begin < 60 * minutes:
            with tempfile.TemporaryDirectory(dir=root) as place:
                done += work(Path(place), number)
            number += 1
            if first is None and time.monotonic() - begin > 20 * minutes:
                first = state(temporary)
        last = state(temporary)
        tempfile.tempdir = None
    first = first or last
    grown = {key: last[key] - first[key] for key in first}
    flat = grown["bytes"] <= max(30 * 2**20, first["bytes"] // 20) and grown["handles"] <= 3 and grown["files"] <= 3
    return {"work": name, "minutes": minutes, "done": done, "after a third": first, "at the end": last, "flat": flat}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="in all")
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    lines = [soak(name, work, minutes / 2) for name, work in (("folder", folder_work), ("training", training))]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "soak.json").write_text(json.dumps(lines, indent=2) + "\n")
    print(*map(json.dumps, lines), sep="\n")
    raise SystemExit(int(not all(line["flat"] for line in lines)))


if __name__ == "__main__":
    main()
