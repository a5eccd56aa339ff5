"""The benchmark of the networks, as a run that has little time."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import interleaved  # noqa: E402


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
