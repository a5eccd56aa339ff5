import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers.cli import app

run = CliRunner()


@pytest.fixture
def files(photo, tmp_path, pipe):
    Image.fromarray(photo).save(tmp_path / "in.png")
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[40:60, 40:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path


def invoke(*arguments):
    return run.invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (["colorize"], (200, 150)),
        (["inpaint", "--mask", "mask.png"], (200, 150)),
        (["uncrop", "--right", "25%", "--top", "10"], (250, 160)),
        (["restore"], (200, 150)),
    ],
)
def test_commands(files, command, size):
    command = [str(files / c) if c.endswith(".png") else c for c in command]
    out = invoke(*command, files / "in.png", "-o", files / "out.png", "--model", files / "model", "--steps", 2)
    assert out.exit_code == 0, out.output
    assert Image.open(files / "out.png").size == size
    assert not list(files.glob(".*part"))


def test_samples_and_seed(files):
    arguments = ["colorize", files / "in.png", "--model", files / "model", "--samples", 2]
    assert invoke(*arguments, "-o", files / "a.png").exit_code == 0
    assert invoke(*arguments, "-o", files / "b.png").exit_code == 0
    first, second = ((files / f"a-{i}.png").read_bytes() for i in (1, 2))
    assert first == (files / "b-1.png").read_bytes() and first != second


def test_info(files):
    out = invoke("info", "--model", files / "model")
    assert out.exit_code == 0 and "colorization" in out.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["colorize", "none.png"],
        ["colorize", "in.png", "-o", "nowhere/out.png"],
        ["colorize", "in.png", "-o", "out.xyz"],
        ["colorize", "in.png", "-o", "in.png"],
        ["colorize", "in.png", "--model", "nothing"],
        ["colorize", "in.png", "--steps", "0", "--model", "model"],
        ["colorize", "in.png", "--dtype", "int3"],
        ["colorize", "in.png", "--max-megapixels", "0.01", "--model", "model"],
        ["uncrop", "in.png", "--model", "model"],
        ["inpaint", "in.png", "--mask", "none.png", "--model", "model"],
        ["uncrop", "in.png", "--left", "wide"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, arguments, monkeypatch):
    monkeypatch.chdir(files)
    if "nothing" in arguments:
        arguments = [a if a != "nothing" else "./nothing" for a in arguments]
    before = sorted(files.iterdir())
    original = (files / "in.png").read_bytes()
    out = invoke(*arguments)
    assert out.exit_code == 2
    assert sorted(files.iterdir()) == before and (files / "in.png").read_bytes() == original


def test_import_is_quick():
    """Nothing is imported before the first name is used; the best of three."""
    code = "import time; t = time.perf_counter(); import palette_diffusers; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.1


def test_help_is_quick():
    """No torch, no diffusers for --help."""
    code = "import sys, palette_diffusers.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    begin = time.time()
    subprocess.run([sys.executable, "-m", "palette_diffusers.cli", "--help"], check=True, capture_output=True)
    assert time.time() - begin < 5
