"""kill -9 at random moments of everything that takes long; afterwards nothing is lost or half-written, and it goes on.

    python -m torture.faults --kills 200 --seed 0 --minutes 60

Goes on where it was stopped: each round of kills is a line of `outputs/torture/faults-SEED.jsonl`.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from torture.files import noise
from torture.log import Log

OUTPUT = Path("outputs/torture")
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "palette_diffusers.cli"]
ROUND = 10  # kills before a run is let through to its end
TOY = ROOT / "tests" / "toy.py"
RATERS = """
import json, re, sys, time, requests
from pathlib import Path
from palette_diffusers.evaluation.fool_rate import HASTY, Study, build, find_pairs

folder = Path(sys.argv[1])
study = Study(find_pairs(folder / "results", folder / "originals"), folder / "votes.sqlite")
_, url, _ = build(study, 3).launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)

def click(button, session, value):
    asked = {"data": [value], "fn_index": button, "session_hash": session}
    requests.post(f"{url}gradio_api/queue/join", json=asked).raise_for_status()
    with requests.get(f"{url}gradio_api/queue/data", {"session_hash": session}, stream=True) as stream:
        for line in stream.iter_lines():
            event = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return event["output"]["data"][3]

for number in range(200):
    rater = f"{sys.argv[2]}-{number}"
    said = click(0, rater, rater)
    while found := re.match(r"(\\d+) of", said):
        print(rater, int(found[1]) - 1, flush=True)  # votes that the page says are kept
        time.sleep(HASTY)
        said = click(1 + number % 2, rater, None)
    assert "Thank you" in said, said
"""


@dataclass(frozen=True)
class Victim:
    """A long run. work: what shows, as a glob, that it has begun; check: what must hold after a kill, given what the
    killed process printed; end: of the finished run, what an undisturbed one must equal."""

    prepare: Callable[[Path], None]
    command: Callable[[Path, bool], list[str]]
    begun: str
    seconds: float  # of work, about: when kills come
    check: Callable[[Path, str], None]
    end: Callable[[Path], object]


@cache
def model() -> str:
    from torture.surfaces import model_folder

    return model_folder()


def photographs(folder: Path, number: int, side: int = 64) -> None:
    folder.mkdir()
    for i in range(number):
        Image.fromarray(noise(side, side, 3, i * 6 + 2)).save(folder / f"{i:03d}.png")


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}


# what is killed


def check_pictures(folder: Path, said: str) -> None:
    kept = folder / "kept.json"
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    now = digests(folder, "out/*.png")
    assert before.items() <= now.items(), "a finished picture was lost or changed"
    for name in now:
        Image.open(folder / name).load()
    kept.write_text(json.dumps(now))


def train_command(folder: Path, again: bool) -> list[str]:
    from tests.conftest import toy_unet

    unet = {k: v for k, v in dict(toy_unet().config).items() if not k.startswith("_")}
    options = dict(data=folder / "images", output=folder / "run", size=32, batch=4, steps=60, workers=0,
        save_every=7, log_every=3, warmup=1, validate_every=0, tracker="none", unet=json.dumps(unet))  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    resume = ["--resume"] if any((folder / "run").glob("step-*.pt")) else []
    return [sys.executable, str(ROOT / "train" / "train_palette.py"), *flags, *resume]


def check_states(folder: Path, said: str) -> None:
    kept = folder / "kept.json"
    before = json.loads(kept.read_text()) if kept.is_file() else 0
    steps = [torch.load(p, weights_only=True)["step"] for p in (folder / "run").glob("step-*.pt")]
    assert max(steps, default=0) >= before, f"step {before} was saved, now there are {steps}"
    kept.write_text(json.dumps(max(steps, default=0)))
    if (folder / "run" / "pipeline").is_dir():
        from palette_diffusers import PalettePipeline

        PalettePipeline.from_pretrained(folder / "run" / "pipeline")


def check_batches(folder: Path, said: str) -> None:
    for path in (folder / "eval").rglob("*.safetensors"):
        load_file(path)
    for path in (folder / "eval").rglob("*.json"):
        json.loads(path.read_text())
    for path in (folder / "eval").rglob("*.png"):
        Image.open(path).load()


def evaluation_figures(folder: Path) -> object:
    rows = json.loads((folder / "eval" / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def prepare_evaluation(folder: Path) -> None:
    photographs(folder / "images", 160, 32)


def evaluation_command(folder: Path, again: bool) -> list[str]:
    return [*COMMAND, "evaluate", f"{TOY}:gray", "--data", f"{folder}/images", "--features",
        f"{TOY}:Colors", "--task", "inpainting,colorization", "--against", "telea", "--batch", "4",
        "--size", "32", "-o", f"{folder}/eval"]  # fmt: skip


def check_repository(folder: Path, said: str) -> None:
    """Every commit of the hub is the empty one, or whole by its own checksums."""
    for repo in hub().repos.values():
        for files in repo.commits.values():
            sums = files.get("SHA256SUMS")
            if sums is None:
                assert set(files) == {".gitattributes"}, "half a publication"
                continue
            for line in sums.decode().splitlines():
                digest, name = line.split("  ", 1)
                assert hashlib.sha256(files[name]).hexdigest() == digest, name
    leftovers = [p for p in folder.iterdir() if p.name.startswith(".palette-")]
    assert not leftovers, leftovers


@cache
def hub():
    from tests.hub_server import serve

    context = serve()
    running = context.__enter__()
    hub.context = context  # as long as this process lives
    return running


def prepare_votes(folder: Path) -> None:
    photographs(folder / "originals", 20, 32)
    photographs(folder / "results", 20, 32)


TOLD = re.compile(r"\d+-\d+ [1-9]\d*")  # a rater, and the number of votes that the page says are kept


def check_votes(folder: Path, said: str) -> None:
    with sqlite3.connect(folder / "votes.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        there = set(database.execute("SELECT rater, pair FROM votes"))
    told = [line.split() for line in said.splitlines() if TOLD.fullmatch(line)]
    counted = Counter(rater for rater, _ in there)
    for rater, number in told:
        assert counted[rater] >= int(number), f"{rater} was told of {number} votes, {counted[rater]} are there"


VICTIMS = {
    "training": Victim(
        lambda folder: photographs(folder / "images", 6, 80), train_command, "run/step-*.pt", 5, check_states,
        lambda folder: {name: value.sum().item() for name, value in
            torch.load(folder / "run" / "step-0000060.pt", weights_only=True)["unet"].items()},
    ),
    "folder": Victim(
        lambda folder: photographs(folder / "album", 300),
        lambda folder, again: [*COMMAND, "colorize", f"{folder}/album", "-o", f"{folder}/out", "--model", model(),
            "--steps", "2", "--dtype", "float32"],
        "out/*.png", 5, check_pictures, lambda folder: digests(folder, "out/*"),
    ),
    "evaluation": Victim(
        prepare_evaluation, evaluation_command, "eval/*/*/*.safetensors", 10, check_batches, evaluation_figures
    ),
    "publishing": Victim(
        lambda folder: None,
        lambda folder, again: [*COMMAND, "publish", model(), f"me/{folder.name}", "--license", "mit"],
        "", 5, check_repository, lambda folder: len(hub().repos[f"me/{folder.name}"].files()),
    ),
    "votes": Victim(
        prepare_votes, lambda folder, again: [sys.executable, "-c", RATERS, str(folder), str(time.time_ns())],
        "votes.sqlite", 25, check_votes, lambda folder: None,
    ),
}  # fmt: skip
SHARES = {"training": 0.25, "folder": 0.25, "evaluation": 0.2, "publishing": 0.2, "votes": 0.1}


# killing


def start(victim: Victim, folder: Path, again: bool) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub().url, "HF_TOKEN": "hf_good",
        "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    said = open(folder / "said.txt", "a")
    return subprocess.Popen(
        victim.command(folder, again), env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_work(victim: Victim, folder: Path, process: subprocess.Popen) -> None:
    before = len(list(folder.glob(victim.begun))) if victim.begun else 0
    begin = time.monotonic()
    while victim.begun and process.poll() is None and time.monotonic() - begin < 120:
        if len(list(folder.glob(victim.begun))) > before or (before and time.monotonic() - begin > 5):
            return
        time.sleep(0.01)


def finished(victim: Victim, folder: Path) -> object:
    assert start(victim, folder, True).wait(300) == 0, (folder / "said.txt").read_text()[-2000:]
    return victim.end(folder)


@cache
def undisturbed(name: str) -> object:
    with tempfile.TemporaryDirectory() as folder:
        VICTIMS[name].prepare(Path(folder))
        return finished(VICTIMS[name], Path(folder))


def round_of(name: str, seed: int, kills: int) -> dict[str, object]:
    """Kills a run `kills` times, lets it end, and compares it with an undisturbed one."""
    victim, rng, killed = VICTIMS[name], random.Random(f"{name}-{seed}"), 0
    base = Path(tempfile.mkdtemp(prefix=f"torture-{name}-"))
    try:
        folder = base / "killed"
        folder.mkdir()
        victim.prepare(folder)
        for number in range(kills):
            process = start(victim, folder, bool(number))
            if rng.random() < 0.8:  # the others are killed while they are starting
                wait_for_work(victim, folder, process)
            try:
                process.wait(rng.uniform(0, victim.seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            if folder.joinpath("votes.sqlite").is_file() or name != "votes":
                victim.check(folder, (folder / "said.txt").read_text())
            if name == "publishing":  # which leaves its temporary folder to the system, as every program does
                shutil.rmtree(folder)
                folder.mkdir()
        problem = ""
        if name == "votes":
            assert any(map(TOLD.fullmatch, (folder / "said.txt").read_text().splitlines())), "nobody came to vote"
        else:
            end, expected = finished(victim, folder), undisturbed(name)
            assert end == expected, f"the end differs: {str(end)[:500]} {str(expected)[:500]}"
            parts = [p for p in folder.rglob("*.part")]
            assert not parts, f"left behind: {parts}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return {"victim": name, "seed": seed, "kills": killed, "problem": problem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--victim", choices=VICTIMS)
    asked = parser.parse_args()
    log, end = Log(OUTPUT / f"faults-{asked.seed}.jsonl", "victim"), time.monotonic() + 60 * asked.minutes
    done = log.done()
    rounds = [(name, asked.seed * 1000 + number) for name, share in SHARES.items()
        for number in range(-(-round(asked.kills * share) // ROUND)) if asked.victim in (None, name)]  # fmt: skip
    random.Random(asked.seed).shuffle(rounds)
    for name, number in rounds:
        if (name, number) in done or time.monotonic() > end:
            continue
        line = round_of(name, number, ROUND)
        print(json.dumps(line), flush=True)
        log.add(line)
    for name in VICTIMS:
        mine = log.of(name)
        bad = sum(bool(line["problem"]) for line in mine)
        print(f"{name}: {sum(line['kills'] for line in mine)} kills in {len(mine)} runs, {bad} with findings")
    raise SystemExit(log.exit_code())


if __name__ == "__main__":
    main()
