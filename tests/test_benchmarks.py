"""The benchmarks: what they time, what they print of their rows, and which options they refuse."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from palette_diffusers import PaletteScheduler
from palette_diffusers.tasks import Given

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import interleaved  # noqa: E402


@pytest.fixture
def script(monkeypatch):
    """A benchmark by its name, as a module; its neighbours are found as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def call(script, monkeypatch, capsys):
    """(benchmark, options) => the exit status, what it printed and its last line of errors."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        status = 0
        try:
            script(name).main()
        except SystemExit as end:
            status = end.code
        out, errors = capsys.readouterr()
        return status, out, (errors.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def photographs(tmp_path):
    """A folder of parquet with two photographs."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    rows = {"image": [Image.new("RGB", (64, 64), color) for color in ("red", "blue")], "name": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "photos" / "validation-0.parquet")
    return tmp_path / "photos"


def row(solver="paper's", steps=1000, distance=2.0, seconds=20.0, **more):
    shared = {"task": "inpainting", "start": None, "count": 100, "model": None, "evaluations": steps}
    return {"solver": solver, "steps": steps, "distance": distance, "seconds": seconds} | shared | more


def rows_file(path, *rows):
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_calls_take_turns_until_time_is_up():
    turns, reports = [], []

    def call(name, seconds):
        return lambda: (turns.append(name), time.sleep(seconds))

    calls = {"a": call("a", 0.1), "b": call("b", 0.3)}
    times = interleaved(calls, 2, report=reports.append)
    assert "".join(turns) == "ababab" and set(times) == {"a", "b"} and 0.1 < times["a"][0] < times["b"][0]
    assert [set(seen) for seen in reports] == [set(), {"a", "b"}, {"a", "b"}]

    turns.clear()
    assert set(interleaved(calls, 9, seconds=0.45)) == {"a"} and "".join(turns) == "aba"  # b has no counted call
    turns.clear()
    assert interleaved(calls, 9, seconds=-1) == {} and not turns


def test_what_was_measured_is_written(tmp_path):
    """Rows that there was no time for are left out; nothing at all is said."""

    def run(minutes):
        file = tmp_path / "out" / f"{minutes}.json"
        command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--networks", "64 pixels, 64 wide", "--batch", "1",
                   "--rounds", "1", "--only", "forward|ours|float32,peak", "--device", "cpu", "--minutes", minutes,
                   "--output", file]  # fmt: skip
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())["rows"], file.with_suffix(".md").read_text(), done

    rows, table, done = run(5)
    assert {row["what"] for row in rows} == {"forward", "peak"} and all(row["seconds"] > 0 for row in rows)
    assert table.strip() == done.stdout.strip() and "s at first" in done.stderr
    rows, table, done = run(0)
    assert rows == [] and "nothing was measured in the time" in table


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("network", ["--only", "mem"], "--only has mem, expected some of memory, int8"),
        ("peers", ["--networks", "32"], "--networks has 32, expected some of 64 pixels, 128 wide; "),
        ("speed", ["--only", "sample,data"], "--only has data, which needs --data: expected a folder"),
        ("speed", ["--only", "sampel"], "--only has sampel, expected some of sample, large"),
        ("quality", ["--data", "D", "--folder", "F", "--solver", "NoSuch"], "--solver is 'NoSuch', expected a"),
        ("quality", ["--data", "D", "--folder", "F", "--solver", "UNet2DModel"], "--solver is 'UNet2DModel', expected"),
        ("quality", ["--data", "D", "--folder", "F", "--solver", "PNDMScheduler"], "--solver: PNDMScheduler doesn't"),
        ("jpeg", ["--data", "D", "--qualities", "5,x"], "--qualities: '5,x' came, expected whole numbers"),
        ("solvers", ["--output", "O"], "nothing to do, expected --data, --table, --against or --figure"),
        ("solvers", ["--output", "O", "--table"], "O has rows of no photographs: expected --count"),
        ("solvers", ["--output", "O", "--figure", "F.png"], "O has rows of no photographs: expected --count"),
        ("solvers", ["--output", "O", "--data", "D", "--solvers", "Euler"], "--solvers has Euler, expected some of"),
        ("solvers", ["--output", "O", "--data", "D", "--tasks", "no"], "--tasks: "),
        ("solvers", ["--output", "O", "--data", "D", "--steps", "0"], "--steps has 0, expected at least 1"),
        ("solvers", ["--output", "O", "--data", "D", "--count", "0"], "--count is 0, expected at least 2"),
    ],
)
def test_options_are_checked_before_anything_is_measured(name, options, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = call(name, *options)
    assert (status, out) == (2, "") and f"{name}: error: " in error and message in error


@pytest.mark.parametrize("name", ["jpeg", "texture"])
def test_more_photographs_than_there_are(name, call, photographs):
    status, _, error = call(name, "--data", photographs, "--count", "3")
    assert status == 2 and f"--count is 3, expected 1 to 2, the photographs of {photographs}" in error


@pytest.mark.parametrize("name", ["speed", "network", "quality", "jpeg", "peers", "sizes", "solvers", "texture"])
def test_the_folder_of_the_output_is_made_first(name, call, tmp_path):
    """Options stop at the first that is wrong: what is after --output was not looked at when the folder was there."""
    call(name, "--output", tmp_path / "a" / "b" / "x.json", "--no-such-option")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    status, _, error = call(name, "--output", tmp_path / "file" / "x.json")
    assert status == 2 and "the folder of" in error and "can't be made" in error
    status, _, error = call(name, "--output", tmp_path)
    assert status == 2 and f"{tmp_path} is a folder, expected a file" in error


def test_the_table_takes_the_count_of_its_file(call, tmp_path):
    file = rows_file(tmp_path / "x.json", row())
    status, out, _ = call("solvers", "--output", file, "--table")
    assert status == 0 and "| paper's | 2.00 |" in out
    status, _, error = call("solvers", "--output", file, "--table", "--count", "200")
    assert status == 2 and f"--count is 200, but {file} has rows of 100 photographs" in error
    rows_file(file, row(), row(count=200))
    status, _, error = call("solvers", "--output", file, "--table")
    assert status == 2 and "has rows of 100, 200 photographs: expected --count" in error


def test_a_figure_needs_rows_that_it_draws(call, tmp_path):
    pytest.importorskip("matplotlib")
    file = rows_file(tmp_path / "x.json", row(start=2.0))
    status, _, error = call("solvers", "--output", file, "--figure", tmp_path / "x.png")
    assert status == 2 and f"from a task's own start or from noise, {file} has none" in error


def test_speeds_are_means_of_runs_on_one_processor(call, tmp_path):
    """Of the reference, a start that leaves steps out counts for the distance alone."""
    few = {"solver": "checkpoint's own", "steps": 4, "model": "student"}
    file = rows_file(
        tmp_path / "x.json", row(seconds=22.0, start=-99.0), row(seconds=18.0, distance=2.2, start=-99.0),
        row(seconds=11.0, distance=1.8, start=-20.0, evaluations=600), row(distance=1.8, seconds=0.1, **few),
        row(distance=2.2, seconds=0.3, **few, seed=1), row(distance=2.3, seconds=0.001, **few, seed=2, cpu="another"),
        row("DDIM", 9, 3.0, 0.5, cpu="another"),
    )  # fmt: skip
    status, out, _ = call("solvers", "--output", file, "--against", "paper's,1000")
    lines = out.splitlines()[2:]
    assert status == 0 and lines == [
        "| inpainting | student, checkpoint's own | 4 | 4 | 3 | 2.10 ± 0.26 | +5.0% | 0.200 | 100x |",
        "| inpainting | DDIM | 9 | 9 | 1 | 3.00 | +50.0% |  |  |",
        "| inpainting | paper's, from noise | 1000 | 1000 | 3 | 2.00 ± 0.20 | +0.0% | 20.000 | 1x |",
    ]
    for wrong, message in (("paper's", "expected a solver and its steps"), ("paper's,9", "has no such row of 100")):
        status, _, error = call("solvers", "--output", file, "--against", wrong)
        assert status == 2 and message in error


def test_only_sampling_is_timed(script, monkeypatch):
    """Not degrading, the classifier's features or their distance."""
    solvers, clock = script("solvers"), [0.0]

    def taking(seconds, work):
        def run(*given, **options):
            clock[0] += seconds
            return work(*given, **options)

        return run

    class Photos(list):
        def batch(self, indices):
            return torch.rand(len(indices), 3, 8, 8) * 2 - 1

    monkeypatch.setattr(solvers.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(solvers, "degrade", taking(100, solvers.degrade))
    monkeypatch.setattr(solvers, "frechet_distance", taking(100, solvers.frechet_distance))

    def denoise(given: Given, *rest, predict, **options):
        predict()
        return given.known

    pipe = SimpleNamespace(scheduler=PaletteScheduler(), denoise=taking(3, denoise), _predict=lambda: None)
    features = taking(100, lambda x: (x.flatten(1)[:, :2], None))
    bench = solvers.Bench(pipe, Photos(range(4)), features)
    for _ in range(2):  # the sources are degraded by the first
        found = bench.measure(solvers.SOLVERS["checkpoint's own"], 1, "colorization")
        assert found["seconds"] == 3 / 4 and found["evaluations"] == 1


def test_a_model_is_told_by_its_files(script, tmp_path):
    from palette_diffusers.pipeline import STARTER, STUDENT

    identity, names = script("solvers").identity, []
    for folder, weights in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / folder / "final" / "unet").mkdir(parents=True)
        (tmp_path / folder / "final" / "unet" / "x.safetensors").write_text(weights)
        names.append(identity(str(tmp_path / folder / "final")))
    assert names[0] != names[1] and names[0] == names[2] and all(name.startswith("final@") for name in names)
    assert identity(None) is identity("starter") is identity(str(STARTER)) is None
    assert identity("starter-few-steps") == identity(str(STUDENT)) == "starter-few-steps"
    assert identity("me/palette") == "me/palette"


def test_streaming_is_measured_by_itself(script):
    """What this process holds does not count."""
    ballast = torch.ones(2**27)  # 512 MiB
    before, after = script("evaluation").peaks_of_streaming(1000)
    assert 100 < before < after < before + 100
    assert after < script("peers").peak_memory() * 1024 - 256, ballast.sum()
