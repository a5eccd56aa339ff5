import base64
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers.cli import app
from palette_diffusers.evaluation.fool_rate import CHECK_EVERY, QUESTION, Study, find_pairs, say, wilson

ROOT = Path(__file__).parents[1]
COUNT = 11


@pytest.fixture
def folders(tmp_path, photo):
    """Results are the originals upside down."""
    for name in ("results", "originals"):
        (tmp_path / name).mkdir()
    for i in range(COUNT):
        crop = photo[i * 4 : i * 4 + 32, i * 6 : i * 6 + 32]
        Image.fromarray(crop).save(tmp_path / "originals" / f"{i}.png")
        Image.fromarray(crop[::-1].copy()).save(tmp_path / "results" / f"{i}.png")
    return tmp_path / "results", tmp_path / "originals"


@pytest.fixture
def study(folders, tmp_path):
    return Study(find_pairs(*folders), tmp_path / "votes.sqlite")


def judge(study, rater, fooled, attentive=True):
    """A rater who is fooled by the first `fooled` pairs."""
    number = 0
    while pair := study.next(rater):
        chose_result = not attentive if pair.check else number < fooled
        number += not pair.check
        study.vote(rater, pair, study.result_left(rater, pair) == chose_result, 1.0)


def test_wilson_equals_scipy():
    from scipy.stats import binomtest

    for hits, number in ((0, 7), (3, 10), (478, 1000), (9, 9)):
        theirs = binomtest(hits, number).proportion_ci(method="wilson")
        assert wilson(hits, number) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


def test_the_rate_counts_raters_who_looked(study):
    judge(study, "ann", 4)
    judge(study, "bob", 7)
    judge(study, "careless", COUNT, attentive=False)
    summary = study.summary()
    assert (summary["votes"], summary["fooled"], summary["left_out"]) == (2 * COUNT, 11, ["careless"])
    assert summary["fool_rate"] == 0.5 and (summary["low"], summary["high"]) == wilson(11, 22)
    assert "50.0%" in say(summary) and "2 raters" in say(summary) and "careless" in say(summary)


def test_orders_and_sides_are_each_raters_own(study):
    assert study.next("ann").name == study.next("ann").name
    first = {study.next(f"rater {i}").name for i in range(20)}
    assert len(first) > 5
    sides = [study.result_left(f"rater {i}", pair) for i in range(20) for pair in study.pairs.values()]
    assert 0.35 < np.mean(sides) < 0.65


def test_a_second_vote_is_not_counted_and_a_study_is_continued(study, folders, tmp_path):
    pair = study.next("ann")
    study.vote("ann", pair, True, 1.0)
    study.vote("ann", pair, False, 1.0)
    again = Study(find_pairs(*folders), tmp_path / "votes.sqlite")
    (row,) = again.rows()
    assert row["chose_result"] == row["result_left"] and again.progress("ann") == (1, len(study.pairs))
    assert again.next("ann").name != pair.name
    with pytest.raises(ValueError, match="holds votes about other pairs"):
        Study(find_pairs(*folders, count=5), tmp_path / "votes.sqlite")


def test_attention_checks_show_what_nobody_takes_for_a_photograph(folders):
    pairs = find_pairs(*folders, count=10)
    checks = [pair for pair in pairs if pair.check]
    assert len(checks) == 10 // CHECK_EVERY and not {c.original for c in checks} & {
        p.original for p in pairs if not p.check
    }
    spoiled, original = (np.asarray(picture).astype(int) for picture in checks[0].pictures())
    assert np.array_equal(original, np.asarray(Image.open(checks[0].original)))
    assert len(np.unique(spoiled.reshape(-1, 3), axis=0)) <= 36 < len(np.unique(original.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r, o: (r / "3.png").unlink(), "1 pictures have no partner"),
        (lambda r, o: Image.new("RGB", (32, 30)).save(r / "3.png"), "is 32x30, its original 32x32"),
        (lambda r, o: [p.unlink() for p in r.iterdir()], "is no folder with pictures"),
        (lambda r, o: (r.parent / "votes.sqlite").write_text("no database, but long enough to be taken for a file"),
            "is no file of votes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folders, tmp_path, spoil, words):
    spoil(*folders)
    out = CliRunner().invoke(app, ["fool-rate", *map(str, folders), "--votes", str(tmp_path / "votes.sqlite")])
    assert out.exit_code == 2 and words in out.output and len(out.output.splitlines()) == 1


def test_votes_are_exported_over_an_earlier_export_alone(study, folders, tmp_path):
    votes, photo, link, table = (tmp_path / n for n in ("votes.sqlite", "photo.jpg", "link.csv", "votes.csv"))
    Image.new("RGB", (8, 8)).save(photo)
    link.symlink_to(votes)
    before = votes.read_bytes(), photo.read_bytes()

    def export(path, votes=votes):
        return CliRunner().invoke(app, ["fool-rate", *map(str, folders), "--votes", str(votes), "--export", str(path)])

    for path, words in ((votes, "is the file of votes"), (link, "is the file of votes"), (photo, "is no CSV of votes")):
        out = export(path)
        assert out.exit_code == 2 and words in out.output and len(out.output.splitlines()) == 1
    assert before == (votes.read_bytes(), photo.read_bytes())
    assert export(tmp_path / "new.sqlite", tmp_path / "new.sqlite").exit_code == 2
    assert not (tmp_path / "new.sqlite").exists()
    for number in (0, 1):
        assert export(table).exit_code == 0 and len(list(csv.DictReader(table.open()))) == number
        study.vote("ann", study.next("ann"), True, 1.0)


def serve(folders, votes, port):
    command = [sys.executable, "-m", "palette_diffusers.cli", "fool-rate", *map(str, folders), "--votes", str(votes),
        "--seconds", "1", "--count", "4", "--port", str(port)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = time.time()
    while time.time() - begin < 90:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
            return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the page did not come up")


class Rater:
    """A browser window of someone who always takes the picture on one side."""

    def __init__(self, browser, name, side):
        self.name, self.side = name, side
        self.page = browser.new_context().new_page()

    def begin(self, url):
        self.page.goto(url)
        self.page.get_by_label("Your name").fill(self.name)
        self.page.get_by_role("button", name="Start").click()
        self.page.locator(".pair img").first.wait_for(state="attached")  # they vanish soon

    def pictures(self):
        sources = self.page.locator(".pair img").evaluate_all("images => images.map(image => image.src)")
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1])))) for s in sources]

    def choose(self):
        number = self.page.locator(".pair").get_attribute("data-number")
        self.page.wait_for_timeout(400)  # a click at once would count as the last pair's second
        self.page.get_by_role("button", name=self.side).click()
        self.page.wait_for_function(
            "n => { const p = document.querySelector('.pair'); return !p || p.dataset.number !== n }", arg=number
        )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_two_raters_and_a_kill_in_the_middle(folders, tmp_path):
    from playwright.sync_api import sync_playwright

    votes = tmp_path / "votes.sqlite"
    study = Study(find_pairs(*folders, count=4), votes)
    port = free_port()
    server = serve(folders, votes, port)
    url = f"http://127.0.0.1:{port}/"
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            raters = [Rater(browser, "ann", "Left"), Rater(browser, "bob", "Right")]
            for rater in raters:
                rater.begin(url)
                assert QUESTION in rater.page.content()
                pair = study.next(rater.name)
                pictures = [np.asarray(picture) for picture in pair.pictures()]
                order = pictures if study.result_left(rater.name, pair) else pictures[::-1]
                assert all(map(np.array_equal, rater.pictures(), order))
            pair = raters[0].page.locator(".pair")
            pair.evaluate("pair => new Promise(r => setTimeout(r, 1300))")
            assert pair.evaluate("pair => getComputedStyle(pair.firstChild).visibility") == "hidden"
            for rater in raters * 2:
                rater.choose()
            server.send_signal(signal.SIGKILL)
            server.wait()
            kept = study.rows()
            assert len(kept) == 4
            server = serve(folders, votes, port)
            for rater in raters:
                rater.begin(url)
            while any(study.next(rater.name) for rater in raters):
                for rater in raters:
                    if study.next(rater.name):
                        rater.choose()
            assert raters[0].page.get_by_text("You have judged all pairs").is_visible()
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
    rows = study.rows()
    assert rows[:4] == kept and len(rows) == 2 * len(study.pairs)
    for row in rows:
        left = row["rater"] == "ann"
        assert row["chose_result"] == (left == bool(row["result_left"])) and row["seconds"] >= 0.3
    out = CliRunner().invoke(app, ["fool-rate", *map(str, folders), "--votes", str(votes), "--count", "4",
        "--export", str(tmp_path / "votes.csv")])  # fmt: skip
    assert out.exit_code == 0 and out.output.splitlines()[0] == say(study.summary())
    assert [r["pair"] for r in csv.DictReader(open(tmp_path / "votes.csv"))] == [r["pair"] for r in rows]
