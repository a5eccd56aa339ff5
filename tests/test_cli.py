import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import toy_unet
from PIL import Image
from test_canvas import png_of_16_bits
from typer.testing import CliRunner

from palette_diffusers import PalettePipeline, PaletteScheduler, canvas, recipes, sizes
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


STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation => how the camera turned it, Image.Transpose


@pytest.mark.parametrize("command", ["colorize", "inpaint --mask 0,0,20,30", "uncrop --right 8", "restore"])
def test_turned_photographs_come_out_upright(photo, files, command):
    """The mask and the sides are of the upright one."""
    upright, made = Image.fromarray(photo[:90, :120]), {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turn = STORED.get(orientation)
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        stored.save(files / "turned.png", exif=exif)
        target = files / f"{orientation}.png"
        out = invoke(*command.split(), files / "turned.png", "-o", target, "--model", files / "model", "--steps", 1)
        assert out.exit_code == 0, out.output
        made[orientation] = Image.open(target)
        assert made[orientation].getexif().get(0x0112, 1) == 1
        np.testing.assert_array_equal(made[orientation], made[1], str(orientation))
    if "mask" in command:
        np.testing.assert_array_equal(np.asarray(made[1])[30:], photo[30:90, :120])


def test_samples_and_seed(files):
    arguments = ["colorize", files / "in.png", "--model", files / "model", "--samples", 2]
    assert invoke(*arguments, "-o", files / "a.png").exit_code == 0
    assert invoke(*arguments, "-o", files / "b.png").exit_code == 0
    first, second = ((files / f"a-{i}.png").read_bytes() for i in (1, 2))
    assert first == (files / "b-1.png").read_bytes() and first != second


def test_samples_make_a_sheet(files):
    out = invoke("colorize", files / "in.png", "-o", files / "a.png", "--model", files / "model", "--samples", 3)
    assert Image.open(files / "a-sheet.png").size == (2 * (200 + 8) + 8, 2 * (150 + 8) + 8)
    pictures = [np.asarray(Image.open(files / f"a-{i}.png"), float) for i in (1, 2, 3)]
    mean = np.mean([np.abs(pictures[a] - pictures[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert f"diversity: {mean:.1f} levels" in out.output


@pytest.mark.parametrize(
    ("command", "sample"),
    [
        (["inpaint", "--mask", "mask.png"], 2),
        (["inpaint", "--mask", "40,40,60,70"], 1),
        (["uncrop", "--aspect", "2:1"], 2),
        (["uncrop", "--aspect", "2:1", "--no-texture"], 1),
        (["restore", "--eta", "0.4"], 1),
    ],
)
def test_a_picture_is_made_again(files, command, sample):
    """From the file alone and its photograph beside it; a photograph that changed is told."""
    command = [str(files / c) if c.endswith(".png") else c for c in command]
    arguments = ["--model", files / "model", "--steps", 2, "--seed", 7, "--samples", 2, "--dtype", "float32"]
    assert invoke(*command, files / "in.png", "-o", files / "a.png", *arguments).exit_code == 0
    (files / "mask.png").rename(files / "hole.png")
    named = ["--mask", files / "hole.png"] if "mask.png" in command[-1] else []
    out = invoke("again", files / f"a-{sample}.png", "-o", files / "b.png", *named)
    assert out.exit_code == 0, out.output
    assert (files / "b.png").read_bytes() == (files / f"a-{sample}.png").read_bytes()
    if command[0] == "restore":
        assert recipes.read(files / "b.png")["options"]["eta"] == 0.4
        assert invoke("restore", files / "in.png", "-o", files / "c.png", *arguments).exit_code == 0
        assert (files / f"c-{sample}.png").read_bytes() != (files / f"a-{sample}.png").read_bytes()
    Image.new("RGB", (200, 150)).save(files / "in.png")
    out = invoke("again", files / f"a-{sample}.png", *named)
    assert out.exit_code == 2 and "its bytes differ" in out.output


def test_a_picture_is_made_again_by_its_own_network(files):
    model, moved = files / "model", files / "moved"
    done = invoke("colorize", files / "in.png", "-o", files / "a.png", "--model", model, "--steps", 1)
    assert done.exit_code == 0 and len(recipes.read(files / "a.png")["weights"]) == 16
    out = invoke("again", files / "a.png", "-o", files / "a.png")
    assert out.exit_code == 2 and "a.png is an input" in out.output
    model.rename(moved)
    PalettePipeline(toy_unet(seed=1), PaletteScheduler()).save_pretrained(model)
    out = invoke("again", files / "a.png", "-o", files / "b.png")
    assert out.exit_code == 2 and "has other weights" in out.output and not (files / "b.png").exists()
    assert invoke("again", files / "a.png", "-o", files / "b.png", "--model", moved).exit_code == 0
    assert np.array_equal(Image.open(files / "b.png"), Image.open(files / "a.png"))
    made, other = recipes.read(files / "b.png"), recipes.read(files / "a.png")
    assert made.pop("model") == str(moved) and other.pop("model") == str(model) and made == other
    options = ["-o", files / "h.png", "--model", moved, "--steps", 1, "--dtype", "float16"]
    half = invoke("colorize", files / "in.png", *options)
    assert half.exit_code == 0 and recipes.read(files / "h.png")["weights"] is None, "it is rounded, and not known"
    (files / "album").mkdir()
    (files / "in.png").rename(files / "album" / "in.png")
    assert "1 done" in invoke("colorize", files / "album", "-o", files / "out", "--model", model, "--steps", 1).output
    shutil.rmtree(model)
    moved.rename(model)
    out = invoke("colorize", files / "album", "-o", files / "out", "--model", model, "--steps", 1).output
    assert "1 there already" in out and "by other weights" in out


def test_the_quality_of_a_jpeg_is_told(files, photo):
    Image.fromarray(photo).save(files / "in.jpg", quality=17)
    Image.fromarray(photo).save(files / "mild.jpg", quality=90)
    Image.open(files / "in.jpg").save(files / "again.jpg", quality=95)
    Image.open(files / "in.jpg").crop((3, 0, 200, 150)).save(files / "copy.png")
    known = {
        "in.jpg": "in.jpg: a JPEG of quality 17\n",
        "in.png": "in.png: no JPEG\n",
        "mild.jpg": "mild.jpg: a JPEG of quality 90; if it was resized after it had been a worse one, --no-consistent",
        "again.jpg": "again.jpg: a JPEG of quality 95, made of one of quality 17\n",
        "copy.png": "copy.png: shows a JPEG of quality 17\n",
    }
    for name, words in known.items():
        out = invoke("restore", files / name, "-o", files / "out.png", "--model", files / "model", "--steps", 1)
        assert out.exit_code == 0 and words in out.stderr and words not in out.stdout


def test_plan_writes_nothing(files):
    out = invoke("colorize", files / "in.png", "--model", files / "model", "--steps", 3, "--plan")
    assert out.exit_code == 0 and "in.png: 200x150, colorization" in out.output, out.output
    height, width = sizes.fit(150, 200, 32, 2).outer
    assert f"3 x 1 of {width}x{height} pixels" in out.output and "about" in out.output, out.output
    assert not (files / "in-colorization.png").exists()
    out = invoke("colorize", files, "-o", files / "out", "--model", files / "model", "--plan")
    assert "2 photographs, 0 there already" in out.output and not (files / "out").exists()


def test_what_can_not_be_made_again(files):
    for name, message in (("in.png", "has no recipe"), ("none.png", "no such file")):
        out = invoke("again", files / name)
        assert out.exit_code == 2 and message in out.output, out.output


def test_date_and_place_can_be_left_out(files, photo):
    exif = Image.Exif()
    exif[306] = "1999:12:31 23:59:59"
    Image.fromarray(photo).save(files / "dated.jpg", exif=exif)
    for more, kept in (([], True), (["--no-exif"], False)):
        target = files / f"out{kept}.png"
        arguments = ["colorize", files / "dated.jpg", "-o", target, "--model", files / "model", "--steps", 1, *more]
        assert invoke(*arguments).exit_code == 0
        assert (306 in Image.open(target).getexif()) == kept
        assert invoke("again", target, "-o", files / "again.png").exit_code == 0
        assert (files / "again.png").read_bytes() == target.read_bytes()


def test_fast_is_the_shipped_student(tmp_path, photo):
    """Of the same bits, laid out in the same way."""
    Image.fromarray(photo).save(tmp_path / "in.png")
    for name, options in (("fast", ["--speed", "fast"]), ("student", ["--model", "starter-few-steps"])):
        out = invoke("colorize", tmp_path / "in.png", "-o", tmp_path / f"{name}.png", *options)
        assert out.exit_code == 0, out.output
    fast, student = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("fast", "student"))
    assert abs(fast - student).max() <= 1 and (fast != student).mean() < 1e-3
    assert "starter-few-steps" in invoke("info").output


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


SOUND = {"task": "colorization", "model": None, "dtype": "float32", "steps": 1, "seed": 0, "sample": 0, "samples": 1,
    "options": {}, "mask": None, "source": {"name": "in.png", "sha256": "0"}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[" * 100_000, "has no recipe"),
        ("3", "has no recipe"),
        ({"seed": None}, "whose seed"),
        ({"sample": 1}, "whose sample"),
        ({"samples": 10**9}, "whose samples"),
        ({"source": {}}, "whose source"),
        ({"mask": "http://127.0.0.1/tell"}, "whose mask"),
        ({"options": {"output_type": "np"}}, "whose options"),
        ({"source": {"name": "../../in.png", "sha256": "0"}}, "its bytes differ"),  # of the name, the last part alone
    ],
)
def test_a_strangers_recipe(files, photo, change, message):
    image = Image.fromarray(photo)
    image.info[canvas.RECIPE] = change if isinstance(change, str) else json.dumps(SOUND | change)
    canvas.save(image, files / "kept.png")
    out = invoke("again", files / "kept.png")
    assert out.exit_code == 2 and message in out.stderr and len(out.stderr.splitlines()) == 1, out.output


def test_making_again_does_not_overwrite_the_photograph(files):
    before = (files / "in.png").read_bytes()
    assert invoke("colorize", files / "in.png", "--model", files / "model", "--steps", 1).exit_code == 0
    out = invoke("again", files / "in-colorization.png", "-o", files / "in.png")
    assert out.exit_code == 2 and "is an input" in out.output and (files / "in.png").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("scan-1.png", ["colorize", "scan-1.png", "-o", "scan.png", "--samples", 2]),
        ("scan-sheet.png", ["restore", "scan-sheet.png", "-o", "scan.png", "--samples", 2]),
        ("mask.png", ["inpaint", "in.png", "--mask", "mask.png", "-o", "mask.png"]),
        ("strokes.png", ["colorize", "in.png", "--hints", "strokes.png", "-o", "./strokes.png"]),
        ("in.png", ["colorize", "in.png", "-o", "link.png"]),
    ],
)
def test_nothing_is_written_over_what_it_is_made_from(files, source, arguments, monkeypatch):
    """Before the model is loaded."""
    for name in ("scan-1.png", "scan-sheet.png", "strokes.png"):
        Image.open(files / "in.png").save(files / name)
    (files / "link.png").hardlink_to(files / "in.png")
    monkeypatch.chdir(files)
    before = (files / source).read_bytes()
    out = invoke(*arguments, "--model", "nowhere")
    assert out.exit_code == 2 and "is an input" in out.output and (files / source).read_bytes() == before, out.output


@pytest.mark.parametrize("name", ["a.psd", "a.cur", "a.gif", "a", "a.xyz"])
def test_a_file_that_cannot_be_written_is_refused_at_once(files, name):
    for command in (["colorize", files / "in.png"], ["again", files / "kept.png"]):
        image = Image.open(files / "in.png").convert("RGB")
        image.info[canvas.RECIPE] = json.dumps(SOUND)
        canvas.save(image, files / "kept.png")
        out = invoke(*command, "-o", files / name, *(["--model", "nowhere"] if command[0] == "colorize" else []))
        assert out.exit_code == 2 and "unknown suffix" in out.output and ".png, .jpg" in out.output, out.output


def test_no_recipe_is_written_that_is_refused_later(files):
    for option, most in recipes.MOST.items():
        out = invoke("colorize", files / "in.png", f"--{option}", most + 1)
        assert out.exit_code == 2 and str(most) in out.output.replace("10_000", "10000"), out.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "0"], "device is '0', expected auto or cpu"),
        (["--max-megapixels", "inf"], "max-megapixels is inf"),
        (["--max-megapixels", "nan"], "max-megapixels is nan"),
        (["--seed", "9" * 40], "--seed"),
    ],
)
def test_numbers_and_names_out_of_range(files, options, message):
    out = invoke("colorize", files / "in.png", "--model", files / "model", *options)
    assert out.exit_code == 2 and message in out.stderr and "Traceback" not in out.output, out.output


def test_a_second_run_in_a_folder_is_told(files):
    from palette_diffusers.files import alone

    arguments = ["colorize", files, "-o", files / "out", "--model", files / "model", "--steps", 1]
    with alone(files / "out"):
        out = invoke(*arguments)
    assert out.exit_code == 2 and "another run is at work" in out.stderr and not list((files / "out").glob("*.png"))
    assert invoke(*arguments).exit_code == 0


def test_a_full_disk_and_a_folder_that_cannot_be_written(files):
    """Files end at 2,000 bytes, by the system's own limit; /sys takes no files, from root neither."""
    import resource

    command = ["colorize", files / "in.png", "--steps", "1", "--model", files / "model", "-o"]
    out = subprocess.run(
        [sys.executable, "-m", "palette_diffusers.cli", *command, files / "out.png"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)), capture_output=True, text=True,
    )  # fmt: skip
    nowhere = invoke(*command, "/sys/out.png")
    ends = (out.returncode, out.stderr, "File too large"), (nowhere.exit_code, nowhere.stderr, "/sys")
    for code, error, words in ends:
        assert code == 2 and words in error.splitlines()[-1] and "Traceback" not in error, error
    assert not list(files.glob("*out.png*")) and not list(files.glob(".*"))


def test_what_is_lost_of_a_file_is_told(files):
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), np.uint16)
    source = png_of_16_bits(files / "deep.png", pixels)
    out = invoke("colorize", source, "-o", files / "out.png", "--model", files / "model", "--steps", 1)
    assert out.exit_code == 0
    assert f"palette: {source} has 16 bits a channel: colour is read at 8, so the finer half" in out.stderr


def test_two_photographs_of_one_name(files):
    """The second took the place of the first's result."""
    Image.open(files / "in.png").save(files / "in.jpg")
    options = ["--model", files / "model", "--steps", 1]
    assert invoke("colorize", files / "in.png", *options).exit_code == 0
    before = (files / "in-colorization.png").read_bytes()
    assert invoke("colorize", files / "in.png", *options).exit_code == 0, "its own result may be made anew"
    out = invoke("colorize", files / "in.jpg", *options)
    assert out.exit_code == 2 and "in-colorization.png is the result of in.png" in " ".join(out.stderr.split())
    assert (files / "in-colorization.png").read_bytes() == before
    (files / "there").mkdir()
    assert invoke("colorize", files / "in.jpg", "-o", files / "there", *options).exit_code == 0
    assert (files / "there" / "in-colorization.png").is_file()
    out = invoke("colorize", files / "in.png", "-o", files / "there", *options)
    assert out.exit_code == 2 and "is the result of in.jpg" in " ".join(out.stderr.split())


@pytest.mark.parametrize("mask", ["10, 10, 20, 20", "#f00"])
def test_a_word_for_a_mask_is_kept_as_it_is_known(files, mask):
    image = Image.open(files / "in.png").convert("RGB")
    image.paste("red", (10, 10, 20, 20))
    image.save(files / "painted.png")
    options = ["--model", files / "model", "--steps", 1]
    assert invoke("inpaint", files / "painted.png", "--mask", mask, "-o", files / "h.png", *options).exit_code == 0
    out = invoke("again", files / "h.png", "-o", files / "h2.png")
    assert out.exit_code == 0, out.output
    assert np.array_equal(np.asarray(Image.open(files / "h2.png")), np.asarray(Image.open(files / "h.png")))


def test_the_plan_of_a_folder_passes_a_broken_file(files):
    (files / "album").mkdir()
    (files / "album" / "a.jpg").write_bytes(b"no picture")
    Image.open(files / "in.png").save(files / "album" / "b.jpg")
    out = invoke("colorize", files / "album", "-o", files / "out", "--plan", "--model", files / "model", "--steps", 1)
    assert out.exit_code == 0 and "b.jpg: 200x150" in out.stdout and "a.jpg" in out.stderr, out.output


def test_no_exif_leaves_no_other_description(files):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a exif:GPSLatitude="48"/></x:xmpmeta>'
    Image.open(files / "in.png").convert("RGB").save(files / "placed.jpg", xmp=xmp)
    for more, kept in (([], True), (["--no-exif"], False)):
        options = ["--model", files / "model", "--steps", 1, *more]
        assert invoke("colorize", files / "placed.jpg", "-o", files / "out.png", *options).exit_code == 0
        assert (b"GPSLatitude" in (files / "out.png").read_bytes()) == kept
