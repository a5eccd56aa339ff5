import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import toy_unet
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers import PalettePipeline, PaletteScheduler, canvas, cli, folders
from palette_diffusers.folders import Job, plan, run


@pytest.fixture
def album(tmp_path, photo):
    """Photographs of two shapes in two folders, a file that is none, and one that is broken."""
    root = tmp_path / "album"
    (root / "old").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(photo[i : i + 90, : 120 - 40 * (i % 2)]).save(root / f"{i}.png")
    Image.fromarray(photo[:60, :60]).save(root / "old" / "grandma.jpg", exif=Image.Exif().tobytes())
    (root / "old" / "broken.jpg").write_bytes(b"\xff\xd8no")
    (root / "notes.txt").write_text("not a photograph")
    return root


def negative(jobs, pictures, masks):
    """Stands for a model, where only the handling of files is looked at."""
    return [Image.fromarray(((1 - p.image[0].permute(1, 2, 0).numpy()) * 127.5).astype(np.uint8)) for p in pictures]


def test_names_and_folders_are_kept(album, tmp_path):
    jobs = plan(album, tmp_path / "out", recursive=True)
    assert [str(job.target.relative_to(tmp_path / "out")) for job in jobs] == [
        "0.png", "1.png", "2.png", "3.png", "old/broken.png", "old/grandma.png",
    ]  # fmt: skip
    assert len(plan(album, tmp_path / "out")) == 4


def test_a_broken_file_is_told_and_stops_nothing(album, tmp_path):
    report = run(plan(album, tmp_path / "out", recursive=True), negative)
    assert (report.done, report.skipped) == (5, 0)
    assert [path.name for path, _ in report.failed] == ["broken.jpg"]
    assert Image.open(tmp_path / "out" / "old" / "grandma.png").size == (60, 60)


def test_what_is_done_is_passed_over(album, tmp_path):
    jobs = plan(album, tmp_path / "out")
    run(jobs[:2], negative)
    before = jobs[0].target.stat().st_mtime_ns
    report = run(jobs, negative)
    assert (report.done, report.skipped) == (2, 2) and jobs[0].target.stat().st_mtime_ns == before
    assert run(jobs, negative, overwrite=True).done == 4 and jobs[0].target.stat().st_mtime_ns > before


def test_one_that_the_model_cannot_mend_fails_alone(album, tmp_path):
    def moody(jobs, pictures, masks):
        if any(job.source.name == "2.png" for job in jobs):
            raise FloatingPointError("the sample is not finite")
        return negative(jobs, pictures, masks)

    report = run(plan(album, tmp_path / "out"), moody)
    assert report.done == 3 and report.failed == [(album / "2.png", "the sample is not finite")]


def test_a_full_disk_leaves_nothing_half_written(album, tmp_path, monkeypatch):
    def full(self, stream, *args, **kwargs):
        stream.write(b"half a picture")
        raise OSError(28, "No space left on device")

    jobs = plan(album, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(jobs, negative)
    assert not [p for p in (tmp_path / "out").iterdir()]
    assert run(jobs, negative).done == 4


def test_a_permission_lost_in_the_middle(album, tmp_path, monkeypatch):
    """What is written stays, the run ends with the reason, and goes on once the folder can be written again."""
    replace, allowed = os.replace, 2

    def guarded(source, target):
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", guarded)
        with pytest.raises(PermissionError):
            run(plan(album, tmp_path / "out"), negative)
    there = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(there) == 2 and all(name.endswith(".png") for name in there)
    assert run(plan(album, tmp_path / "out"), negative).done == 2


def test_an_accelerator_that_is_lost(album, tmp_path, pipe, monkeypatch):
    pipe.set_progress_bar_config(disable=True)
    forward, calls = pipe.unet.forward, 0

    def lost(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
        return forward(*args, **kwargs)

    monkeypatch.setattr(cli, "_load", lambda *args: pipe)
    monkeypatch.setattr(folders, "AHEAD", 1)
    monkeypatch.setattr(pipe.unet, "forward", lost)
    arguments = ["colorize", str(album), "-o", str(tmp_path / "out"), "--steps", "1"]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 2 and "accelerator failed" in told.output and "CUDA error" in told.output, told.output
    assert "Traceback" not in told.output and "DSA" not in told.output
    kept = list((tmp_path / "out").glob("*.png"))
    again = CliRunner().invoke(cli.app, arguments)
    assert f"{4 - len(kept)} done, {len(kept)} there already, 0 failed" in again.output, again.output
    assert len(kept) == 1


def test_a_mask_belongs_to_its_own_photograph(tmp_path):
    """IMG.2.png is not the mask of IMG.jpg, though it comes first."""
    for folder, suffix in (("photos", "jpg"), ("masks", "png")):
        (tmp_path / folder).mkdir()
        for stem in ("IMG", "IMG.2", "[a]"):
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{stem}.{suffix}")
    jobs = plan(tmp_path / "photos", tmp_path / "out", masks=tmp_path / "masks")
    assert len(jobs) == 3 and all(job.mask.stem == job.source.stem for job in jobs)
    (tmp_path / "masks" / "IMG.png").unlink()
    jobs = {job.source.name: job for job in plan(tmp_path / "photos", tmp_path / "out", masks=tmp_path / "masks")}
    assert "no mask for IMG.jpg" in jobs["IMG.jpg"].problem and not jobs["IMG.2.jpg"].problem


def test_results_of_other_settings_are_told(album, tmp_path, pipe, monkeypatch):
    """They stay, since nobody asked to lose them; what made them is in the files."""
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(cli, "_load", lambda *args: pipe)

    def uncrop(*more):
        told = CliRunner().invoke(cli.app, ["uncrop", str(album), "-o", str(tmp_path / "out"), "--steps", "1", *more])
        assert told.exit_code == 0, told.output
        return told.output

    side = ["--right", "25%"]
    assert "otherwise" not in uncrop(*side)
    before = (tmp_path / "out" / "0.png").read_bytes()
    assert uncrop(*side) == "0 done, 4 there already, 0 failed\n"
    other = uncrop("--right", "16", "--seed", "1")
    assert "4 of those made otherwise (seed 0, now 1; options {" in other and "--overwrite" in other, other
    assert (tmp_path / "out" / "0.png").read_bytes() == before
    Image.open(album / "1.png").save(tmp_path / "out" / "1.png")  # no recipe: nobody knows
    assert "3 of those made otherwise (seed 0, now 1)" in uncrop(*side, "--seed", "1")
    assert uncrop(*side, "--seed", "1", "--overwrite") == "4 done, 0 there already, 0 failed\n"
    assert uncrop(*side, "--seed", "1") == "0 done, 4 there already, 0 failed\n"


def test_a_photograph_that_changed_is_told(album, tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *args: pipe)
    arguments = ["inpaint", str(album), "--mask", "10,10,30,30", "-o", str(tmp_path / "out"), "--steps", "1"]
    assert "otherwise" not in CliRunner().invoke(cli.app, arguments).output
    (album / "0.png").touch()
    assert "otherwise" not in CliRunner().invoke(cli.app, arguments).output
    Image.open(album / "1.png").save(album / "0.png")
    told = CliRunner().invoke(cli.app, arguments).output
    assert "one of those made otherwise" in told and "0.png has changed" in told, told


def test_of_slow_tasks_each_result_is_written_when_it_is_made(album, tmp_path, pipe, monkeypatch):
    """A killed run lost up to 32 photographs."""
    monkeypatch.setattr(cli, "_load", lambda *args: pipe)
    whole, seen = type(pipe).__call__, []

    def call(self, pictures, **options):
        seen.append((len(pictures), len(list((tmp_path / options["task"]).glob("*.png")))))
        return whole(self, pictures, **options)

    monkeypatch.setattr(type(pipe), "__call__", call)
    for command, task in (("restore", "jpeg_restoration"), ("colorize", "colorization")):
        seen.clear()
        told = CliRunner().invoke(cli.app, [command, str(album), "-o", str(tmp_path / task), "--steps", "1"])
        assert "4 done" in told.output
        assert [number for number, _ in seen] == ([1] * 4 if command == "restore" else [4])
        assert command != "restore" or seen[-1][1] > 0


def test_what_needs_no_border_is_finished_as_others(tmp_path, photo, pipe, monkeypatch):
    """It kept date and place with --no-exif, and had no recipe."""
    monkeypatch.setattr(cli, "_load", lambda *args: pipe)
    exif = Image.Exif()
    exif[0x9003] = "1999:12:31 23:59:59"
    (tmp_path / "in").mkdir()
    Image.fromarray(photo[:90, :160]).save(tmp_path / "in" / "wide.jpg", exif=exif)
    out = tmp_path / "out"
    arguments = ["uncrop", str(tmp_path / "in"), "--aspect", "16:9", "--no-exif", "-o", str(out), "--steps", "1"]
    told = CliRunner().invoke(cli.app, arguments)
    assert "1 done" in told.output
    made = Image.open(out / "wide.png")
    assert made.size == (160, 90) and not len(made.getexif()) and canvas.RECIPE in made.info


def test_bounded_look_ahead(album, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "AHEAD_PIXELS", 20_000)
    sizes = []

    def counted(jobs, pictures, masks):
        sizes.append(len(jobs))
        return negative(jobs, pictures, masks)

    assert run(plan(album, tmp_path / "out"), counted).done == 4
    assert sizes == [3, 1]  # 90x120 + 90x80 + 90x120 pass the limit


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("album", {}, "lies in"),
        ("album/out", dict(recursive=True), "lies in"),
        ("masks", dict(masks="masks"), "masks/0.png is a mask, and a result would take its place"),
        ("out", dict(masks="album"), "has the photographs themselves"),
        ("one", dict(masks="one/0.png"), "one/0.png is a mask"),
    ],
)
def test_bad_plans(album, tmp_path, output, options, message):
    """The masks were overwritten by results, or photographs taken for their own."""
    for folder in ("masks", "one"):
        (tmp_path / folder).mkdir()
        Image.new("L", (120, 90)).save(tmp_path / folder / "0.png")
    if "masks" in options:
        options = dict(masks=tmp_path / options["masks"])
    with pytest.raises((ValueError, OSError), match=message):
        plan(album, tmp_path / output, **options)


def test_two_that_would_write_one(album, tmp_path, photo, monkeypatch):
    """That, a photograph without its mask and one whose name is too long stop nothing."""
    Image.fromarray(photo).save(album / "0.jpg")
    Image.fromarray(photo).save(album / "._1.png")
    Image.fromarray(photo).save(album / f"{'写' * 80}.jpg")
    Image.fromarray(photo).save(album / f"{'b' * 250}.tif")
    monkeypatch.setattr(folders.canvas, "part_name", lambda path: f".{path.name}.")
    report = run(plan(album, tmp_path / "out"), negative)
    assert report.done == 4 and len(report.failed) == 3, report
    assert any("0.jpg and " in why and "would both write" in why for _, why in report.failed)
    monkeypatch.undo()
    report = run(plan(album, tmp_path / "out"), negative)
    assert (report.done, report.skipped, len(report.failed)) == (2, 4, 1)
    assert (tmp_path / "out" / f"{'写' * 80}.png").is_file()
    with pytest.raises(ValueError, match="no photographs .*--recursive looks"):
        (tmp_path / "empty").mkdir()
        plan(tmp_path / "empty", tmp_path / "out")


def test_masks_by_name(album, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(4):
        mask = np.zeros((90, 120 - 40 * (i % 2)), np.uint8)
        mask[10:20, 10 : 20 + i] = 255
        Image.fromarray(mask).save(masks / f"{i}.png")
    holes = []

    def seen(jobs, pictures, given):
        holes.extend(int(mask.sum()) for mask in given)
        return negative(jobs, pictures, given)

    assert run(plan(album, tmp_path / "out", masks=masks), seen).done == 4
    assert holes == [100, 110, 120, 130]
    assert plan(album, tmp_path / "out", masks="0,0,9,9")[0] == Job(album / "0.png", tmp_path / "out/0.png", "0,0,9,9")


def command(album, out, model, *more):
    options = ["--model", str(model), "--steps", "2", "--dtype", "float32", *more]
    return [sys.executable, "-m", "palette_diffusers.cli", "colorize", str(album), "-o", str(out), *options]


def test_killed_and_started_again(album, tmp_path, pipe, photo):
    """kill -9 as soon as a result is there; the second run makes the rest, and all equal an undisturbed run's."""
    for i in range(40):
        Image.fromarray(photo[i : i + 50, i : i + 50]).save(album / f"more-{i}.png")
    pipe.save_pretrained(tmp_path / "model")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(album, tmp_path / "b", tmp_path / "model"), env=env)
    while process.poll() is None and not list((tmp_path / "b").glob("*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "b").mkdir(exist_ok=True)
    (tmp_path / "b" / ".0.png.abc.part").write_bytes(b"half")  # as a kill may leave it
    (tmp_path / "b" / "0.png").unlink(missing_ok=True)
    done = subprocess.run(command(album, tmp_path / "b", tmp_path / "model"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "b").glob(".*.part"))
    # two processes as accelerate launch starts them: each its share, nothing twice
    shares = [
        subprocess.Popen(
            command(album, tmp_path / "a", tmp_path / "model"), stdout=subprocess.PIPE, text=True,
            env=env | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert sorted(share.communicate()[0] for share in shares) == ["22 done, 0 there already, 0 failed\n"] * 2
    for path in sorted((tmp_path / "a").glob("*.png")):
        a, b = (np.asarray(Image.open(tmp_path / name / path.name)).astype(int) for name in "ab")
        assert np.abs(a - b).max() <= 2, path.name
    assert len(list((tmp_path / "a").glob("*.png"))) == len(list((tmp_path / "b").glob("*.png"))) == 44


def test_a_broken_file_makes_exit_code_1(album, tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        command(album, tmp_path / "out", tmp_path / "model", "--recursive"), capture_output=True, text=True
    )
    assert done.returncode == 1 and "5 done, 0 there already, 1 failed" in done.stdout
    assert "broken.jpg" in done.stderr and "Traceback" not in done.stderr


def test_a_photograph_that_has_the_aspect_is_taken_over(album, tmp_path):
    """The others are extended; a single one is told instead."""
    toy = tmp_path / "model"
    PalettePipeline(toy_unet(), PaletteScheduler(), default_steps=1).save_pretrained(toy)
    arguments = ["uncrop", str(album), "-o", str(tmp_path / "out"), "--aspect", "4:3", "--model", str(toy)]
    told = CliRunner().invoke(cli.app, [*arguments, "--steps", "1"])
    assert told.exit_code == 0 and "4 done, 0 there already, 0 failed" in told.output, told.output
    sizes = [Image.open(tmp_path / "out" / f"{i}.png").size for i in range(4)]
    assert sizes == [(120, 90)] * 4
    same = np.asarray(Image.open(album / "0.png")), np.asarray(Image.open(tmp_path / "out" / "0.png"))
    assert np.array_equal(*same)
    one = CliRunner().invoke(cli.app, ["uncrop", str(album / "0.png"), "--aspect", "4:3", "--model", str(toy)])
    assert one.exit_code == 2 and "nothing to extend" in one.stderr
