"""A folder as a Ray Data job, by real workers, of which one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ray_folder.py"


def workers() -> list[int]:
    """The processes that compute, of any Ray on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::") and b"Mend" in name:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_worker_that_dies_loses_nothing_and_nothing_is_done_twice(photo, tmp_path):
    album, out = tmp_path / "album", tmp_path / "mended"
    (album / "deeper").mkdir(parents=True)
    names = [f"{'deeper/' if i % 3 else ''}{i}" for i in range(16)]
    for i, name in enumerate(names):
        Image.fromarray(np.roll(photo[:96, :96], 7 * i, axis=1)).save(album / f"{name}.jpg")
    (album / "broken.jpg").write_bytes(b"no picture")
    command = [sys.executable, str(EXAMPLE), str(album), str(out), "--task", "colorization", "--workers", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    options = dict(env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, **options) as process:
        deadline = time.monotonic() + 240
        while len(done := list(out.rglob("*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None and len(done) < 14, process.communicate()
        before, victims = {path: path.stat().st_mtime_ns for path in done}, workers()
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        said = process.communicate(timeout=480)[0]
    assert process.returncode == 1 and f"{album / 'broken.jpg'}: " in said, said  # goes on after it, and names it
    assert "16 done, 1 failed" in said
    assert sorted(path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.*")) == sorted(names)
    for path in out.rglob("*.png"):
        assert Image.open(path).convert("RGB").size == (96, 96)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    again = subprocess.run([*command[:4], "--workers", "1"], check=False, **options)
    assert "0 done, 1 failed" in again.stdout  # what is there is passed over
