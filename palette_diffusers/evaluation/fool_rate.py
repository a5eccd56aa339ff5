"""People's judgement: two-alternative forced choice between a result and its original (the paper, section 4).

Every vote is on disk before the next pair is shown, so that a kill loses none; raters go on under their name.
"""

import base64
import csv
import hashlib
import io
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import canvas
from ..canvas import SUFFIXES
from ..files import write_text
from .store import fingerprint

QUESTION = "Which image would you guess is from a camera?"
CHECK_EVERY = 10  # one pair of ten has a picture that nobody takes for a photograph
MISSED = 0.2  # raters who fail more than this share of them are left out
HASTY = 0.3  # seconds below which a click is the last pair's second one
COLUMNS = ("rater", "pair", "attention_check", "result_left", "chose_result", "seconds", "at")


def wilson(hits: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); (0, 1) where nothing was counted.

    >>> low, high = wilson(5, 10)
    >>> round(low, 3), round(high, 3)
    (0.237, 0.763)
    """
    if not number:
        return 0.0, 1.0
    share, extra = hits / number, z**2 / number
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / number + extra / (4 * number))
    return middle - half, middle + half


@dataclass(frozen=True)
class Pair:
    """What a rater sees: `result` and `original` are files of one size. In an attention check the result is the
    original, spoiled."""

    name: str
    result: Path
    original: Path
    check: bool = False

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """The result and the original, without what their files say of themselves."""
        result, original = (
            Image.fromarray(canvas.to_uint8(canvas.read(p).image)) for p in (self.result, self.original)
        )
        return (_spoiled(original) if self.check else result), original


def _spoiled(picture: Image.Image) -> Image.Image:
    small = picture.resize((6, 6), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def find_pairs(results: Path, originals: Path, count: int | None = None, seed: int = 0) -> list[Pair]:
    """Pairs of files of the same name, suffix aside, `count` of them drawn; and attention checks, if possible with
    originals that are not among these.

    Raises:
        FileNotFoundError: a folder without pictures. ValueError: files without a partner, or of another size.
    """
    files = []
    for folder in (results, originals):
        files.append({p.stem: p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES})
        if not files[-1]:
            raise FileNotFoundError(f"{folder} is no folder with pictures")
    alone = sorted(files[0].keys() ^ files[1].keys())
    if alone:
        here = results if alone[0] in files[0] else originals
        raise ValueError(
            f"{len(alone)} pictures have no partner of their name, {files[here is originals][alone[0]]} first"
        )
    names = sorted(files[0])
    if count is not None and not 1 <= count <= len(names):
        raise ValueError(f"{len(names)} pairs are there, {count} were asked for")
    order = np.random.default_rng(seed).permutation(names).tolist()
    drawn = order[:count]
    checks = (order[len(drawn) :] or drawn)[: math.ceil(len(drawn) / CHECK_EVERY)]
    for name in drawn:
        sizes = [Image.open(f[name]).size for f in files]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{files[0][name]} is {sizes[0][0]}x{sizes[0][1]}, its original {sizes[1][0]}x{sizes[1][1]}"
            )
    return [Pair(n, files[0][n], files[1][n]) for n in drawn] + [
        Pair(f"check-{n}", files[0][n], files[1][n], check=True) for n in checks
    ]


class Study:
    """Pairs, and the votes about them in an SQLite file.

    Raises:
        ValueError: the file holds the votes of another study.
    """

    def __init__(self, pairs: list[Pair], votes: Path, seed: int = 0):
        self.pairs, self.votes, self.seed = {pair.name: pair for pair in pairs}, votes, seed
        files = [part for pair in pairs for part in (pair.name, pair.result, pair.original)]
        about = json.dumps({"pairs": fingerprint(*files), "seed": seed})
        try:
            with self._database() as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS votes (rater TEXT, pair TEXT, attention_check INTEGER, "
                    "result_left INTEGER, chose_result INTEGER, seconds REAL, at TEXT, PRIMARY KEY (rater, pair))"
                )
                database.execute("CREATE TABLE IF NOT EXISTS study (about TEXT)")
                there = database.execute("SELECT about FROM study").fetchone()
                if there is None:
                    database.execute("INSERT INTO study VALUES (?)", (about,))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{votes} is no file of votes: {error}") from None
        if there is not None and there[0] != about:
            raise ValueError(f"{votes} holds votes about other pairs, another count or seed: name another file")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One connection a call: raters come in threads of their own."""
        database = sqlite3.connect(self.votes, timeout=30)
        try:
            database.execute("PRAGMA synchronous=FULL")
            with database:
                yield database
        finally:
            database.close()

    def _draw(self, *what: object) -> np.random.Generator:
        digest = hashlib.sha256(json.dumps([self.seed, *map(str, what)]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def next(self, rater: str) -> Pair | None:
        """The rater's first pair without a vote, in an order of their own; None when all are judged."""
        with self._database() as database:
            done = {row[0] for row in database.execute("SELECT pair FROM votes WHERE rater = ?", (rater,))}
        order = self._draw("order", rater).permutation(sorted(self.pairs)).tolist()
        return next((self.pairs[name] for name in order if name not in done), None)

    def result_left(self, rater: str, pair: Pair) -> bool:
        """Which side the result is on, for this rater."""
        return bool(self._draw("side", rater, pair.name).random() < 0.5)

    def vote(self, rater: str, pair: Pair, left: bool, seconds: float) -> None:
        """The rater takes the left (or right) picture for the camera's; a second vote about a pair is not counted."""
        result_left = self.result_left(rater, pair)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = (rater, pair.name, pair.check, result_left, left == result_left, round(seconds, 2), at)
        with self._database() as database:
            database.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def progress(self, rater: str) -> tuple[int, int]:
        """Judged by this rater, and all."""
        with self._database() as database:
            (done,) = database.execute("SELECT COUNT(*) FROM votes WHERE rater = ?", (rater,)).fetchone()
        return done, len(self.pairs)

    def rows(self) -> list[dict[str, Any]]:
        """All votes, in the order they came."""
        with self._database() as database:
            rows = database.execute(f"SELECT {', '.join(COLUMNS)} FROM votes ORDER BY rowid").fetchall()
        return [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def summary(self) -> dict[str, Any]:
        """The fool rate: how often the model's picture was taken for the camera's, with Wilson's interval (each vote
        counted as independent), and which raters failed the attention checks and are left out."""
        rows = self.rows()
        raters = sorted({row["rater"] for row in rows})
        left_out = []
        for rater in raters:
            checks = [row["chose_result"] for row in rows if row["rater"] == rater and row["attention_check"]]
            if checks and sum(checks) / len(checks) > MISSED:
                left_out.append(rater)
        counted = [row for row in rows if row["rater"] not in left_out and not row["attention_check"]]
        fooled = sum(row["chose_result"] for row in counted)
        low, high = wilson(fooled, len(counted))
        return {
            "raters": len(raters), "left_out": left_out, "votes": len(counted), "fooled": fooled,
            "fool_rate": fooled / len(counted) if counted else None, "low": low, "high": high,
        }  # fmt: skip

    def export(self, path: Path) -> None:
        """Every vote as CSV.

        Raises:
            ValueError: another file is there (`check_export`).
        """
        check_export(path, self.votes)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows())
        write_text(path, table.getvalue())


def check_export(path: Path, votes: Path) -> None:
    """Raises:
    ValueError: votes exported to `path` would replace the file of votes, or one that is no earlier export.
    """
    if path.resolve() == votes.resolve():
        raise ValueError(f"{path} is the file of votes: name another one for the CSV")
    header = ",".join(COLUMNS).encode()
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise ValueError(f"{path} is there and is no CSV of votes: name another file")


def say(summary: dict[str, Any]) -> str:
    """A summary in a line.

    >>> say({"raters": 2, "left_out": [], "votes": 10, "fooled": 5, "fool_rate": 0.5, "low": 0.237, "high": 0.763})
    'fool rate 50.0% (95% interval 23.7% to 76.3%), 10 votes of 2 raters'
    """
    out = f"; left out for their attention checks: {', '.join(summary['left_out'])}" if summary["left_out"] else ""
    if not summary["votes"]:
        return f"no votes yet{out}"
    return (
        f"fool rate {summary['fool_rate']:.1%} (95% interval {summary['low']:.1%} to {summary['high']:.1%}), "
        f"{summary['votes']} votes of {summary['raters'] - len(summary['left_out'])} raters{out}"
    )


# the page


def _data(picture: Image.Image) -> str:
    """The file's name and size would tell which is which: pixels alone."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _show(study: Study, rater: str, pair: Pair, seconds: float) -> str:
    result, original = pair.pictures()
    sides = (result, original) if study.result_left(rater, pair) else (original, result)
    done, _ = study.progress(rater)
    width = max(256, result.width)
    images = "".join(
        f'<img src="{_data(picture)}" alt="{side}" style="width:min(45vw,{width}px)">'
        for side, picture in zip(("left", "right"), sides, strict=True)
    )
    # two names for one animation: a browser starts it anew when the name changes
    name = f"vanish-{done % 2}"
    return (
        f"<style>@keyframes {name} {{ to {{ visibility: hidden }} }}</style>"
        f'<div class="pair" data-number="{done}" style="display:flex;gap:24px;justify-content:center;'
        f'animation:{name} 0s linear {seconds}s forwards">{images}</div>'
    )


def build(study: Study, seconds: float) -> Any:
    """The page, a `gradio.Blocks`. Pictures vanish after `seconds`; the answer has no limit.

    Raises:
        ValueError: no time to look. ImportError: Gradio is missing.
    """
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}, expected more than 0 (the paper: 3 or 5)")
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f"the page needs Gradio: pip install 'palette-diffusers[eval]' ({error})") from None

    def page(rater: str | None, message: str = "") -> list[Any]:
        """What the components hold: name's group, judgement's group, pair, message, and what is shown since when."""
        pair = study.next(rater) if rater else None
        if rater is None or pair is None:
            return [gr.update(visible=rater is None), gr.update(visible=False), "", message, None]
        done, number = study.progress(rater)
        shown = {"rater": rater, "pair": pair.name, "at": time.monotonic()}
        return [
            gr.update(visible=False), gr.update(visible=True), _show(study, rater, pair, seconds),
            f"{done + 1} of {number}", shown,
        ]  # fmt: skip

    def begin(name: str) -> list[Any]:
        rater = " ".join(name.split())[:60]
        if not rater:
            return page(None, "Please say your name first.")
        return page(rater, "You have judged all pairs. Thank you!")

    def choose(left: bool, shown: dict | None) -> list[Any]:
        if shown is None:  # the server was started anew
            return page(None, "Please say your name again: your votes are kept.")
        waited = time.monotonic() - shown["at"]
        if waited >= HASTY:
            study.vote(shown["rater"], study.pairs[shown["pair"]], left, waited)
        return page(shown["rater"], "You have judged all pairs. Thank you!")

    with gr.Blocks(title="Which is the photograph?") as app:
        shown = gr.State(None)
        with gr.Column() as who:
            gr.Markdown(
                f"You will see two pictures side by side for {seconds:g} seconds. Then say which of them you would "
                "guess is from a camera. Under the same name you can stop and go on later."
            )
            name = gr.Textbox(label="Your name", max_lines=1)
            start = gr.Button("Start", variant="primary")
        with gr.Column(visible=False) as judgement:
            gr.Markdown(f"### {QUESTION}")
            pair = gr.HTML()
            with gr.Row():
                left, right = gr.Button("Left", min_width=80), gr.Button("Right", min_width=80)
        message = gr.Markdown()
        outputs: Any = [who, judgement, pair, message, shown]
        quiet: Any = dict(show_progress="hidden", concurrency_limit=8, api_visibility="private")
        gr.on([start.click, name.submit], begin, name, outputs, **quiet)
        left.click(lambda s: choose(True, s), shown, outputs, **quiet)
        right.click(lambda s: choose(False, s), shown, outputs, **quiet)
    return app
