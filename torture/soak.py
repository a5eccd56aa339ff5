"""Hours of work in one process: memory, open files and temporary files must stay flat.

    python -m torture.soak --minutes 60

Colorizes, fills, extends and restores photographs of changing sizes through the folder's code, trains in short runs,
and visits the Space, a server of its own, whose figures are taken. After a third of the time as warm-up, nothing may
grow by more than 5% and 30 MiB, or by 3 files.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from palette_diffusers import folders
from palette_diffusers.machine import bound_caches
from palette_diffusers.training import preset, train
from torture.files import noise
from torture.surfaces import TASKS, model_folder, toy_pipe

KEEP = 10  # seconds
WORKS = "folder", "training", "space"
OUTPUT = Path("outputs/torture")


def state(process: int, temporary: Path) -> dict[str, int]:
    """Of a process: its memory, its open files, and what lies in its temporary folder."""
    gc.collect()
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    left = [path for path in temporary.rglob("*") if path.is_file()]
    return {"bytes": memory, "handles": len(os.listdir(f"/proc/{process}/fd")), "files": len(left)}


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


def visits(url: str) -> Callable[[Path, int], int]:
    """A visitor, who asks for a picture by each of the tasks, sends a file that is none, and goes."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    def visit(place: Path, number: int) -> int:
        client = Client(url, verbose=False, download_files=str(place))
        size = 40 + number * 7 % 200, 40 + number * 11 % 200
        photo, mask, broken = place / "photo.png", place / "mask.png", place / "broken.png"
        Image.fromarray(noise(*size, 3, number)).save(photo)
        white = Image.new("L", size[::-1])
        white.paste(255, (5, 5, 30, 30))
        white.save(mask)
        broken.write_bytes(photo.read_bytes()[:40])
        sent = handle_file(photo)
        client.predict(sent, api_name="/colorize")
        client.predict(sent, api_name="/restore_jpeg")
        client.predict(sent, handle_file(mask), api_name="/inpaint")
        client.predict(sent, right=30, api_name="/uncrop")
        with suppress(AppError):
            client.predict(handle_file(broken), api_name="/colorize")
            raise AssertionError("a broken file was taken")
        client.close()
        return 4

    return visit


@contextmanager
def space(temporary: Path) -> Iterator[tuple[int, Callable[[Path, int], int]]]:
    """The demo in a process of its own, whose temporary files go after `KEEP` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_TEMP_DIR": str(temporary / "gradio"), "TMPDIR": str(temporary), "GRADIO_ANALYTICS_ENABLED": "False",
        "PALETTE_KEEP_SECONDS": str(KEEP), "PALETTE_MAX_VISITORS": "8", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "palette_diffusers.cli", "demo", "--model", model_folder(), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.2)
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
        yield process.pid, visits(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.wait(30)


def soak(name: str, minutes: float) -> dict[str, object]:
    """Works for so long; what was held after a third of it, and at the end."""
    begin, number, done, first = time.monotonic(), 0, 0, None
    with tempfile.TemporaryDirectory() as root:
        temporary = Path(root) / "tmp"
        temporary.mkdir()
        model_folder()
        tempfile.tempdir = str(temporary)
        here = nullcontext((os.getpid(), {"folder": folder_work, "training": training}.get(name)))
        with space(temporary) if name == "space" else here as (process, work):
            rest = 3 * KEEP if name == "space" else 0  # what is old has gone by then
            while time.monotonic() - begin < 60 * minutes:
                with tempfile.TemporaryDirectory(dir=root) as place:
                    done += work(Path(place), number)
                number += 1
                if first is None and time.monotonic() - begin > 20 * minutes:
                    time.sleep(rest)
                    first = state(process, temporary)
            time.sleep(rest)
            last = state(process, temporary)
        tempfile.tempdir = None
    first = first or last
    grown = {key: last[key] - first[key] for key in first}
    flat = grown["bytes"] <= max(30 * 2**20, first["bytes"] // 20) and grown["handles"] <= 3 and grown["files"] <= 3
    return {"work": name, "minutes": minutes, "done": done, "after a third": first, "at the end": last, "flat": flat}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="in all")
    parser.add_argument("--work", choices=WORKS, action="append", help="default: all three")
    asked = parser.parse_args()
    works = asked.work or WORKS
    torch.set_num_threads(1)
    bound_caches()
    lines = [soak(name, asked.minutes / len(works)) for name in works]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "soak.json").write_text(json.dumps(lines, indent=2) + "\n")
    print(*map(json.dumps, lines), sep="\n")
    raise SystemExit(int(not all(line["flat"] for line in lines)))


if __name__ == "__main__":
    main()
