import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers import Given, PalettePipeline, canvas, tasks
from palette_diffusers.cli import app
from palette_diffusers.evaluation import evaluate, load_features, load_lpips, load_restorer, metrics, pages
from palette_diffusers.evaluation.features import FeatureNetwork
from palette_diffusers.evaluation.inputs import Batch, Photographs, degrade, sampling_seed
from palette_diffusers.evaluation.lpips import Lpips
from palette_diffusers.evaluation.restorers import Restorer, baseline, from_function
from palette_diffusers.evaluation.store import Store
from palette_diffusers.files import alone

ROOT = Path(__file__).parents[1]
COUNT, BATCH = 24, 4
TOY = ROOT / "tests" / "toy.py"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process, whose precision can't be changed."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory, photo):
    """24 photographs of four classes in a parquet file."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("evaluation")
    crops = [Image.fromarray(photo[i * 4 : i * 4 + 32, i * 6 : i * 6 + 32]) for i in range(COUNT)]
    columns = Features({"image": ImageFeature(), "label": Value("int64")})
    rows = {"image": crops, "label": [i % 4 for i in range(COUNT)]}
    (folder / "data").mkdir()
    Dataset.from_dict(rows, columns).to_parquet(folder / "data" / "validation-0.parquet")
    (folder / "images").mkdir()
    for i, crop in enumerate(crops):
        crop.save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture
def features(work):
    return load_features(f"{TOY}:four")


@pytest.fixture
def photographs(work):
    return Photographs(str(work / "data"), 32)


def features_of(seed, number=60, dimension=8):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=generator)
    return torch.randn(number, dimension, generator=generator) @ mix + seed


def test_frechet_distance_equals_torchmetrics_and_scipy():
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    a, b = features_of(1).double(), features_of(2).double()
    ours = metrics.frechet_distance(a, b)
    covariance = [np.cov(x.numpy().T) for x in (a, b)]
    means = [x.mean(0).numpy() for x in (a, b)]
    root = sqrtm(covariance[0] @ covariance[1]).real
    closed = np.square(means[0] - means[1]).sum() + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert ours == pytest.approx(closed, rel=1e-6)
    torchs = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)).item()
    assert ours == pytest.approx(torchs, rel=1e-4)
    assert metrics.frechet_distance(a, a[torch.randperm(len(a))]) < 1e-6
    # more features than images: singular covariances
    assert metrics.frechet_distance(a[:5], a[:5]) < 1e-5


def test_kernel_distance_and_score_equal_torchmetrics():
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x

    a, b = features_of(1), features_of(2)
    theirs = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=60)
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    assert metrics.kernel_distance(a, b) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    score = InceptionScore(feature=Identity(), splits=1)
    score.update(a)
    (ours,) = metrics.inception_scores(a.split(7))
    assert ours == pytest.approx(score.compute()[0].item(), rel=1e-4)


@pytest.fixture
def darker(photo):
    """(uint8 (H, W, 3), the same darkened and with noise, both as tensors): their means differ, too."""
    noise = np.random.default_rng(0).normal(0, 20, photo.shape)
    worse = (photo * 0.6 + noise).clip(0, 255).round().astype(np.uint8)
    return photo, worse, canvas.read(photo).image, canvas.read(worse).image


def test_ssim_equals_scikit_image_and_torchmetrics(darker):
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    photo, worse, a, b = darker
    # scikit-image leaves the border out: it gets one, as the pictures are reflected
    padded = [np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (worse, photo)]
    theirs = structural_similarity(*padded, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=255, channel_axis=2)  # fmt: skip
    assert metrics.ssim(b, a).item() == pytest.approx(theirs, rel=1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(theirs, rel=1e-4)
    torchs = structural_similarity_index_measure((b + 1) / 2, (a + 1) / 2, reduction="none", data_range=1.0)
    assert metrics.ssim(b, a).item() == pytest.approx(torchs.item(), rel=1e-4)


def terms(a, b, sigma, inside):
    """Wang's luminance and contrast-structure maps of (H, W) in [0, 255], without the border where `inside`."""
    from scipy.ndimage import gaussian_filter

    radius = int(3.5 * sigma + 0.5)
    a_mean, b_mean, aa, bb, ab = (
        gaussian_filter(x, sigma, mode="mirror", radius=radius) for x in (a, b, a * a, b * b, a * b)
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * a_mean * b_mean + c1) / (a_mean**2 + b_mean**2 + c1)
    contrast = (2 * (ab - a_mean * b_mean) + c2) / (aa - a_mean**2 + bb - b_mean**2 + c2)
    cut = slice(radius, -radius) if inside else slice(None)
    return luminance[cut, cut], contrast[cut, cut]


@pytest.mark.parametrize("size", [64, 150])
def test_ms_ssim_equals_its_formula(darker, size):
    """Wang et al. 2003, equation 7: contrast at every scale, luminance at the last."""
    photo, worse, *images = darker
    scales, window = metrics.ms_ssim_scales(size)
    betas = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    expected = 1.0
    a, b = (x[:size, :size].astype(np.float64) for x in (photo, worse))
    for scale, beta in enumerate(betas / betas.sum()):
        last = scale == scales - 1
        found = [terms(a[..., c], b[..., c], 1.5 * window / 11, not last) for c in range(3)]
        expected *= np.mean([light * contrast if last else contrast for light, contrast in found]) ** beta
        a, b = (x[: len(x) // 2 * 2, : len(x) // 2 * 2] for x in (a, b))
        a, b = (x.reshape(len(x) // 2, 2, len(x) // 2, 2, 3).mean((1, 3)) for x in (a, b))
    found = metrics.ms_ssim(*(x[..., :size, :size] for x in images))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_ms_ssim_has_its_name_only_at_full_scale(photo):
    small = canvas.read(photo[:64, :64]).image
    noisy = (small + 0.3 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert metrics.ms_ssim(small, small).item() == pytest.approx(1)
    assert metrics.ms_ssim(small, noisy).item() < 0.95
    assert metrics.ms_ssim_name(176) == "MS-SSIM" != metrics.ms_ssim_name(175)
    for size in (32, 64, 100, 128, 176):
        image = torch.nn.functional.interpolate(small, size)
        assert metrics.ms_ssim(image, image).item() == pytest.approx(1), size


def test_resampled_moments_are_those_of_repeated_images():
    x = features_of(3, 10)
    counts = metrics.resamples(10, 2, seed=1)
    for moments, count in zip(metrics.Moments.resampled(x.split(3), counts), counts, strict=True):
        repeated = x.double()[np.repeat(np.arange(10), count)]
        assert torch.allclose(moments.mean, repeated.mean(0))
        assert torch.allclose(moments.covariance, torch.cov(repeated.T))
    scores = metrics.inception_scores(x.split(4), counts)
    for score, count in zip(scores, counts, strict=True):
        assert score == pytest.approx(metrics.inception_scores([x[np.repeat(np.arange(10), count)]])[0])


def test_interval_covers_a_distance_whose_bootstrap_is_biased():
    """The truth, between two sets of one distribution, is zero plus what few images add to every estimate."""
    x, reference = features_of(4, 200), metrics.Frechet(metrics.Moments.of([features_of(5, 5000)]))
    values = [reference(m) for m in metrics.Moments.resampled([x], metrics.resamples(200, 100))]
    low, high = metrics.interval(values)
    assert low < values[0] < high
    assert np.mean(values[1:]) > values[0]


def test_results_are_those_of_the_pictures_on_disk(work, features, photographs, tmp_path):
    rows = [baseline("identity"), baseline("telea"), from_function(lambda known, mask: known * 0.5, "dim")]
    results = evaluate(rows, photographs, ["inpainting", "jpeg_restoration:5"], features, tmp_path, batch=BATCH,
        replicates=10, progress=False)  # fmt: skip
    table = {(row["task"], row["images"]): row for row in results["rows"]}
    assert set(table) == {("originals", "originals"), ("inpainting", "degraded"), ("inpainting", "Telea"),
        ("inpainting", "dim"), ("jpeg_restoration:5", "degraded"), ("jpeg_restoration:5", "dim")}  # fmt: skip
    assert table["originals", "originals"]["frechet"]["value"] < 1e-6

    def read(folder):
        files = sorted((tmp_path / folder).glob("*.png"))
        assert [f.stem for f in files] == [f"{i:05d}" for i in range(COUNT)]
        return torch.cat([canvas.read(f).image for f in files])

    clean = read("originals/pictures")
    assert torch.equal(clean, photographs.batch(range(COUNT)))
    original, _ = features(clean)
    for variant in ("inpainting", "jpeg_restoration-5"):
        images = read(f"{variant}/dim/pictures")
        found, logits = features(images)
        row = table[variant.replace("-", ":"), "dim"]
        assert row["frechet"]["value"] == pytest.approx(metrics.frechet_distance(found, original), rel=1e-4)
        assert row["distance"]["value"] == pytest.approx((found - original).norm(dim=1).mean().item(), rel=1e-4)
        hits = (logits.argmax(1) == torch.arange(COUNT) % 4).float().mean().item()
        assert row["accuracy"]["value"] == pytest.approx(hits)
        assert row["psnr"]["value"] == pytest.approx(np.median(metrics.psnr(images, clean).numpy()), rel=1e-4)
        assert row["psnr"]["low"] <= row["psnr"]["value"] <= row["psnr"]["high"]
    assert results["figures"]["frechet"] == "FD-toy"
    manifest = json.loads((tmp_path / "inpainting" / "manifest.json").read_text())
    assert len({line["source"] for line in manifest["images"]}) == COUNT
    page = (tmp_path / "index.html").read_text()
    assert "FD-toy" in page and 'src="inpainting/dim/pictures/00003.png"' in page
    assert Image.open(tmp_path / "inpainting.png").size[0] > 8 * 32
    assert not list(tmp_path.rglob("*.part"))


def test_sources_are_fixed_by_the_seed(photographs):
    clean = photographs.batch([0])
    for variant in ("inpainting", "uncropping", "jpeg_restoration:5", "colorization"):
        first, again = degrade(variant, clean, 0), degrade(variant, clean, 0)
        assert torch.equal(first.condition, again.condition)
    assert not torch.equal(degrade("inpainting", clean, 0).mask, degrade("inpainting", clean, 1).mask)
    assert not torch.equal(degrade("inpainting", clean, 0).mask, degrade("inpainting", clean, 0, seed=1).mask)
    right = degrade("uncropping:right", clean, 0).mask[0, 0]
    assert right[:, 16:].all() and not right[:, :16].any()


def test_several_samples_give_diversity(pipe, photographs, features, tmp_path, monkeypatch):
    from palette_diffusers.evaluation.restorers import from_pipeline

    monkeypatch.setattr("palette_diffusers.evaluation.run.DIVERSE", BATCH + 3)  # in the middle of a batch
    row = evaluate([from_pipeline(pipe, steps=2)], photographs, ["inpainting"], features, tmp_path / "a", batch=BATCH,
        samples=2, replicates=5, progress=False)["rows"][1]  # fmt: skip
    assert 0 < row["ms_ssim"]["value"] < 1 and row["spread"]["value"] > 0
    kept = Store(tmp_path / "a" / "inpainting" / "Palette", COUNT // BATCH).column("ms_ssim")
    assert row["about"]["weights"] and len(kept) == BATCH + 3

    def constant(known, mask):
        return known

    row = evaluate([from_function(constant, "constant")], photographs, ["inpainting"], features, tmp_path / "b",
        batch=BATCH, samples=2, replicates=5, progress=False)["rows"][1]  # fmt: skip
    assert "ms_ssim" not in row


def launch(*arguments):
    """By two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "train" / "configs" / "two_cpu_processes.yaml"), "--main_process_port", str(free_port()), "-m",
        "palette_diffusers.cli", "evaluate", *map(str, arguments)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        start_new_session=True)  # fmt: skip


def test_killed_with_two_processes_and_gone_on_equals_one(work, features, photographs, tmp_path, monkeypatch):
    ranks = tmp_path / "ranks"
    monkeypatch.setenv("RANKS", str(ranks))
    arguments = [f"{TOY}:slow", "--data", work / "data", "--features", f"{TOY}:four", "--task",
        "inpainting", "--against", "identity", "--batch", BATCH, "--size", 32, "-o", tmp_path / "two"]  # fmt: skip
    process = launch(*arguments)
    done = tmp_path / "two" / "inpainting" / "slow"
    begin = time.time()
    while len(list(done.glob("*.safetensors"))) < 1 and process.poll() is None and time.time() - begin < 120:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    for worker in {line.split()[1] for line in ranks.read_text().splitlines()}:  # each in a group of its own
        os.kill(int(worker), signal.SIGKILL)
    process.communicate(timeout=60)
    kept = {path: path.stat().st_mtime_ns for path in done.glob("*.safetensors")}
    assert 1 <= len(kept) < COUNT // BATCH and not (tmp_path / "two" / "results.json").exists()
    half = tmp_path / "two" / "inpainting" / "inputs" / ".00000.png.abc.part"
    half.write_bytes(b"half")
    ranks.write_text("")
    process = launch(*arguments)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert "| inpainting | slow |" in out
    worked = [line.split()[0] for line in ranks.read_text().splitlines()]
    assert set(worked) == {"0", "1"} and len(worked) == COUNT // BATCH - len(kept)  # shared, and nothing done twice
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept) and not half.exists()

    rows = [baseline("identity"), from_function(lambda known, mask: known * 0.5, "slow")]
    one = evaluate(rows, photographs, ["inpainting"], features, tmp_path / "one", batch=BATCH, progress=False)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for a, b in zip(one["rows"], two["rows"], strict=True):
        for name in ("frechet", "kernel", "score", "accuracy", "distance", "psnr", "ssim"):
            assert a.get(name) == b.get(name), (a["images"], name)
    paths = [tmp_path / n / "inpainting" / "manifest.json" for n in ("one", "two")]
    assert paths[0].read_text() == paths[1].read_text()


def test_parts_of_others_stay(features, photographs, tmp_path):
    """What a kill left of the evaluation's own files goes, and nothing else."""
    own = ["results.json.part", ".colorization.png.0a1b2c3d.part", "originals/batch-00000.1.part",
        "originals/pictures/.00000.png.0a1b2c3d.part", "colorization/manifest.json.part",
        "colorization/inputs/batch-00000.json.part", "colorization/degraded/batch-00000.1.part",
        "colorization/degraded/pictures/.00000.png.0a1b2c3d.part"]  # fmt: skip
    others = ["film.mkv.part", "videos/film.mkv.part", "step-00000010.part/model.safetensors"]

    def run():
        evaluate([baseline("identity")], photographs, ["colorization"], features, tmp_path, replicates=2,
            progress=False)  # fmt: skip

    run()
    for name in own + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    run()
    assert [name for name in own + others if (tmp_path / name).exists()] == others


def test_an_output_among_what_is_read_is_refused(work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for i in range(COUNT):
        Image.new("RGB", (32, 32)).save(theirs / f"{i:05d}.png")
    before = sorted(tmp_path.rglob("*"))
    for read, output, more in (
        (tmp_path / "images", tmp_path / "link" / "run", ["identity", "--data", tmp_path / "images"]),
        (tmp_path / "link", tmp_path / "images", ["identity", "--data", tmp_path / "link"]),
        (tmp_path / "images", tmp_path / "images" / "a" / "b", ["identity", "--reference", tmp_path / "images"]),
        (theirs, theirs / "run", [theirs]),
    ):
        data = [] if "--data" in more else ["--data", work / "data"]
        out = CliRunner().invoke(app, ["evaluate", *map(str, [*more, *data, "-o", output]), "--features",
            f"{TOY}:four", "--task", "colorization", "--size", "32"])  # fmt: skip
        assert out.exit_code == 2, out.output
        assert out.output.splitlines()[-1] == (
            f"palette: output {output} is in {read}, which is read: name a folder outside it"
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_tasks_of_earlier_calls_stay(features, photographs, tmp_path):
    def run(row, *variants):
        results = evaluate([row], photographs, variants, features, tmp_path, replicates=2, progress=False)
        return [(row["task"], row["images"]) for row in results["rows"][1:]], results["notes"]

    def dim(known, mask):
        return known * 0.5

    run(from_function(dim, "dim", "a"), "jpeg_restoration:5", "colorization")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "manifest.json").write_text('{"name": "a web page"}')
    rows, notes = run(baseline("identity"), "colorization", "colorization")
    assert rows == [("colorization", "dim"), ("colorization", "degraded"), ("jpeg_restoration:5", "dim")]
    assert notes == []
    for name in ("results.md", "index.html"):
        assert "jpeg_restoration:5" in (tmp_path / name).read_text(), name
    rows, notes = run(from_function(dim, "dim", "b"), "colorization")
    assert len(rows) == 3 and notes == ["dim of jpeg_restoration:5 is an earlier call's, by another dim"]
    task = next(path.parent.parent for path in tmp_path.glob("jpeg*/dim/pictures"))
    shutil.rmtree(task / "dim" / "pictures")  # to save space
    rows, _ = run(baseline("identity"), "colorization")
    page = (tmp_path / "index.html").read_text()
    assert len(rows) == 3 and f"{task.name}/dim/pictures" not in page and f"{task.name}/inputs" in page


def test_tasks_may_have_spaces_between(work, tmp_path):
    variants = "colorization, jpeg_restoration:5"
    out = invoke(work, "identity", "--task", variants, "--against", "identity", "-o", tmp_path)
    assert out.exit_code == 0 and "| jpeg_restoration:5 | degraded |" in out.output, out.output


def test_a_size_that_the_network_does_not_take_is_refused_at_once(pipe, work, features, tmp_path):
    from palette_diffusers.evaluation.restorers import from_pipeline

    photographs = Photographs(str(work / "data"), 31)
    multiple = pipe.unet.size_multiple
    with pytest.raises(ValueError, match=f"size is 31, expected a multiple of {multiple} for Palette"):
        evaluate([baseline("identity"), from_pipeline(pipe)], photographs, ["colorization"], features, tmp_path)
    assert not (tmp_path / "originals").exists()


def test_a_task_of_ones_own_is_measured(pipe, work, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    PalettePipeline(pipe.unet, pipe.scheduler, ["negative"], default_steps=2).save_pretrained(tmp_path / "model")
    own = tmp_path / "own.py"
    own.write_text("""from __future__ import annotations
from dataclasses import dataclass
from palette_diffusers import Task, register_task
@dataclass
class Strength:
    value: float = 1.0
@register_task
class Negative(Task):
    name = "negative"
    def degrade(self, clean, generator=None):
        return self.prepare(-clean)
""")
    (tmp_path / "empty.py").write_text("")
    arguments = [tmp_path / "model", "--task", "negative", "--against", "identity", "-o", tmp_path / "run"]
    for more, words in (
        ([], "task is 'negative', expected one of"),
        (["--register", tmp_path / "none.py"], "none.py: no such Python file, expected FILE.py"),
        (["--register", tmp_path / "empty.py"], "empty.py registers no task"),
    ):
        out = invoke(work, *arguments, *more)
        assert out.exit_code == 2 and words in out.output.splitlines()[-1], out.output
    out = invoke(work, *arguments, "--register", own)
    assert out.exit_code == 0 and "| negative | Palette |" in out.output, out.output


def test_one_evaluation_a_folder(work, tmp_path):
    with alone(tmp_path / "out"):
        told = invoke(work, f"{TOY}:gray", "--task", "inpainting", "-o", tmp_path / "out")
    assert told.exit_code == 2 and "another evaluation is at work in" in told.output, told.output
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def invoke(work, *arguments, features="four"):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--data", str(work / "data"), "--features",
        f"{TOY}:{features}", "--size", "32", "--batch", str(BATCH)])  # fmt: skip


def test_results_of_others(work, tmp_path):
    """Inputs first, then a folder of results and a command that were made from them, on the same pixels."""
    out = invoke(work, "identity", "--task", "inpainting", "--against", "telea", "-o", tmp_path / "run")
    assert out.exit_code == 0, out.output
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (tmp_path / "run" / "inpainting" / "inputs").glob("*.png"):
        Image.open(path).point(lambda v: v // 2).save(theirs / path.name)
    copy = tmp_path / "copy.py"
    copy.write_text("import shutil, sys\nshutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)\n")
    command = f"copy={sys.executable} {copy} {{inputs}} {{outputs}}"
    manifest = tmp_path / "run" / "inpainting" / "manifest.json"
    out = invoke(work, theirs, "--against", command, "--task", "inpainting", "--manifest", manifest, "-o",
        tmp_path / "run")  # fmt: skip
    assert out.exit_code == 0, out.output
    rows = {row["images"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    assert set(rows) == {"originals", "degraded", "Telea", "theirs", "copy"}
    assert rows["copy"]["frechet"] == rows["degraded"]["frechet"] != rows["theirs"]["frechet"]


def made_anew(work, specs, output):
    """Two of one name, in turn, in one folder: the second's figures, and what was said."""
    values = []
    for spec in specs:
        out = invoke(work, spec, "--task", "colorization", "--against", "identity", "-o", output)
        assert out.exit_code == 0, out.output
        rows = {row["images"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
        values.append(next(v for k, v in rows.items() if k not in ("originals", "degraded")))
    return values, out.output


def test_figures_of_another_restorer_of_the_same_name_are_made_anew(work, pipe, tmp_path):
    for name, factor in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.py").write_text(f"def fix(known, mask):\n    return known * {factor}\n")
        (tmp_path / name / "results").mkdir()
        for i in range(COUNT):
            Image.new("RGB", (32, 32), (int(factor * 100),) * 3).save(tmp_path / name / "results" / f"{i:05d}.png")
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(3 * factor)
        pipe.save_pretrained(tmp_path / name / "pipeline")
        script = "import shutil, sys\nshutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)\n"
        (tmp_path / name / "copy.py").write_text(f"# {factor}\n{script}")
    command = "x={python} {}/copy.py {{inputs}} {{outputs}}"
    for number, spec in enumerate(("{}/r.py:fix", "{}/results", "{}/pipeline", command)):
        specs = [spec.format(tmp_path / name, python=sys.executable) for name in "ab"]
        output = tmp_path / f"run-{number}"
        (first, second), said = made_anew(work, specs, output)
        assert "is not what it was: its figures are made anew" in said, spec
        (alone,), _ = made_anew(work, specs[1:], tmp_path / f"alone-{number}")
        assert first["about"]["content"] != second["about"]["content"]
        assert second["distance"] == alone["distance"] and (number == 3 or second["distance"] != first["distance"])
        (_, again), said = made_anew(work, specs[1:] * 2, output)
        assert "made anew" not in said and again["restoring_seconds"] == second["restoring_seconds"]
        assert str(tmp_path) not in (output / "results.json").read_text()
    named = [f"{tmp_path}/a/r.py:fix", f"other={tmp_path}/b/r.py:fix"]
    assert "made anew" not in made_anew(work, named, tmp_path / "named")[1]


def test_other_photographs_of_the_same_name_are_refused(work, photographs, features, tmp_path):
    def run(labels):
        photographs.labels = labels
        evaluate([baseline("identity")], photographs, ["colorization"], features, tmp_path, replicates=2)

    run([0] * COUNT)
    with pytest.raises(ValueError, match="holds a run with photographs"):
        run([1] * COUNT)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "00003.png").unlink(), "lacks 1 of 24 pictures (00003.png)"),
        (lambda folder: (folder / "00003.png").rename(folder / "x.png"), "and has 1 that no input belongs to (x.png)"),
        (lambda folder: Image.new("RGB", (32, 32)).save(folder / "x.jpg"), "has 1 that no input belongs to (x.jpg)"),
        (lambda folder: Image.new("RGB", (32, 30)).save(folder / "00003.png"), "is 32x30, the original 32x32"),
        (lambda folder: (folder / "00003.png").write_bytes(b"no"), "not an image"),
    ],
)
def test_a_wrong_folder_of_results_is_one_line(work, tmp_path, spoil, words):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for i in range(COUNT):
        Image.new("RGB", (32, 32)).save(folder / f"{i:05d}.png")
    spoil(folder)
    out = invoke(work, folder, "--task", "colorization", "--against", "identity", "-o", tmp_path / "run")
    assert out.exit_code == 2 and words in out.output.splitlines()[-1]
    assert not (tmp_path / "run" / "results.json").exists()


def test_bad_input_is_one_line(work, tmp_path):
    run = tmp_path / "run"
    assert invoke(work, "identity", "--against", "telea", "--task", "inpainting", "-o", run).exit_code == 0
    missing = "inception" if _no_inception() else "none.py:f"
    lists = tmp_path / "list.txt"
    lists.write_text("nothing.png 3\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "jpeg").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "jpeg" / "00000.jpg")
    broken = tmp_path / "broken.py"
    broken.write_text("def fix(:")
    for arguments, words in (
        (["identity", "--count", 6, "-o", tmp_path / "a"], "needs at least 7"),
        (["identity", "--count", 99, "-o", tmp_path / "a"], "has 24 photographs, 99 were asked for"),
        (["identity", "--task", "ironing", "-o", tmp_path / "a"], "task is 'ironing'"),
        (["identity", "--task", "inpainting:left", "-o", tmp_path / "a"], "expected a task's name or one of"),
        (["identity", "--protocol", "mine", "-o", tmp_path / "a"], "expected starter, palette"),
        (["identity", "--seed", 1, "-o", run], "holds a run with seed 0, 1 came"),
        (["x=identity", "--against", "x=telea", "-o", tmp_path / "a"], "names that differ"),
        ([f"{TOY}:none", "-o", tmp_path / "a"], "has no function 'none'"),
        ([f"{TOY}:narrow", "--task", "inpainting", "-o", tmp_path / "a"], "narrow gave (4, 3, 32, 31)"),
        (["x=false {outputs}", "--task", "inpainting", "-o", tmp_path / "a"], "false ended with code 1"),
        ([f"{TOY}:fails", "--task", "inpainting", "-o", tmp_path / "a"], "fails failed on 00000 to 00003: KeyError"),
        ([f"{TOY}:nothing", "--task", "inpainting", "-o", tmp_path / "a"], "nothing gave a NoneType, expected a"),
        ([f"{broken}:fix", "-o", tmp_path / "a"], "broken.py can't be loaded: SyntaxError"),
        ([tmp_path / "empty", "-o", tmp_path / "a"], "holds neither a model_index.json nor results"),
        ([tmp_path / "jpeg", "-o", tmp_path / "a"], "nor results NAME.png, but 1 other pictures (00000.jpg)"),
        (["identity", "--list", lists, "-o", tmp_path / "a"], "1 files of"),
        (["identity", "--classifier", missing, "-o", tmp_path / "a"], missing.removesuffix(":f")),
        (["identity", "--manifest", run / "results.json", "--task", "inpainting", "-o", tmp_path / "b"], "no manifest"),
    ):
        out = invoke(work, *arguments)
        line = out.output.strip().splitlines()[-1]
        assert out.exit_code == 2 and line.startswith("palette: ") and words in line, (arguments, out.output)


def test_a_torchvision_that_does_not_fit_is_one_line(work, tmp_path):
    """As one that was built for another torch: found, and it fails with RuntimeError."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    about = tmp_path / "torchvision-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    command = [sys.executable, "-m", "palette_diffusers.cli", "evaluate", "identity", "--data", work / "data",
        "--features", f"{TOY}:four", "--size", "32", "-o", tmp_path / "run"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run" / "originals").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("palette: torchvision does not fit torch") and "or remove it" in line


def _no_inception():
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        return True
    return False


def test_other_pixels_are_refused(work, tmp_path):
    assert invoke(work, "identity", "--against", "telea", "--task", "inpainting", "-o", tmp_path / "a").exit_code == 0
    manifest = tmp_path / "a" / "inpainting" / "manifest.json"
    lines = json.loads(manifest.read_text())
    lines["images"][5]["source"] = "0" * 16
    manifest.write_text(json.dumps(lines))
    out = invoke(work, "telea", "--against", "identity", "--task", "inpainting", "--manifest", manifest, "-o",
        tmp_path / "b")  # fmt: skip
    assert out.exit_code == 2 and "picture 00005: its source is" in out.output
    assert len(list((tmp_path / "b" / "inpainting" / "Telea").glob("*.safetensors"))) == 1  # the first batch is kept


def test_a_classifier_with_other_classes_has_no_accuracy(work, tmp_path):
    out = invoke(work, "identity", "--against", "telea", "--task", "inpainting", "-o", tmp_path, features="nine")
    assert out.exit_code == 0 and "accuracy is" not in out.output  # nine classes may hold the labels 0 to 3
    from palette_diffusers.evaluation.inputs import Photographs

    photographs = Photographs(str(work / "data"), 32)
    photographs.classes = ["a", "b", "c", "d"]
    results = evaluate([baseline("identity")], photographs, ["colorization"], load_features(f"{TOY}:nine"),
        tmp_path / "a", batch=BATCH, progress=False)  # fmt: skip
    assert results["notes"] == ["accuracy is left out: toy has 9 classes, the photographs 4"]
    assert all("accuracy" not in row and "frechet" in row for row in results["rows"])
    named = replace(load_features(f"{TOY}:four"), classes=("a", "b", "d", "c"))
    results = evaluate([baseline("identity")], photographs, ["colorization"], named, tmp_path / "b", progress=False)
    assert results["notes"] == ["accuracy is left out: class 2 is 'd' for toy, 'c' of the photographs"]
    named = replace(named, classes=("A", "b", "c", "d"))
    results = evaluate([baseline("identity")], photographs, ["colorization"], named, tmp_path / "c", progress=False)
    assert results["notes"] == [] and "accuracy" in results["rows"][0]


@pytest.mark.parametrize("listed", [False, True])
def test_photographs_are_measured_as_they_are_seen(tmp_path, photo, listed):
    """Levels of 16 bits are scaled, what is transparent is white, a turned one is upright; a damaged one is named."""
    gray = np.asarray(Image.fromarray(photo[:32, :32]).convert("L"))
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "a.png")
    Image.fromarray(gray).save(folder / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo[:32, :32]).save(folder / "c.png", exif=exif)
    clear = Image.fromarray(photo[:32, :32]).convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "d.png")
    (folder / "e.png").write_bytes((folder / "b.png").read_bytes()[:200])
    (tmp_path / "list.txt").write_text("a.png\nb.png\nc.png\nd.png\ne.png\n")
    photographs = Photographs(str(folder), 32, names=tmp_path / "list.txt" if listed else None)
    assert torch.equal(photographs[0], photographs[1]) and photographs[3].min() == 255
    upright = np.rot90(photo[:32, :32], -1)
    assert torch.equal(photographs[2].permute(1, 2, 0), torch.from_numpy(upright.copy()))
    with pytest.raises(ValueError, match=r"photograph 4 \(.*e.png\) can't be decoded"):
        photographs[4]


def test_labels_may_be_names_and_may_lack(tmp_path, photo):
    for i in range(3):
        Image.fromarray(photo[:32, i : i + 32]).save(tmp_path / f"{i}.png")
    names = ["cat", "ant", "cat"]
    for labels, expected, classes in ((names, [1, 0, 1], ["ant", "cat"]), ([3, None, 1], [3, -1, 1], None)):
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        photographs = Photographs(str(tmp_path), 32)
        assert photographs.labels == expected and photographs.classes == classes


def test_a_file_list_names_pictures_and_labels(work, tmp_path):
    lists = tmp_path / "ctest.txt"
    lists.write_text("5.png 1\n2.png 3\n\n7.png\n")
    photographs = Photographs(str(work / "images"), 16, names=lists)
    assert photographs.labels == [1, 3, -1] and photographs[0].shape == (3, 16, 16)
    (work / "images" / "p 1.png").write_bytes((work / "images" / "1.png").read_bytes())
    lists.write_text("p 1.png 2\np 1.png\n1.png\t0\n")
    assert Photographs(str(work / "images"), 32, names=lists).labels == [2, -1, 0]
    for text, words in (("", "is empty, expected"), ("1.png n01440764", "n01440764 is a WordNet id")):
        lists.write_text(text)
        with pytest.raises(ValueError, match=words):
            Photographs(str(work / "images"), 32, names=lists)
    lists.write_text("5.png 1\n2.png 3\n")
    whole = Photographs(str(work / "images"), 32, names=lists)
    assert torch.equal(whole[1].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(work / "images" / "2.png"))))


def test_a_transformers_classifier_measures(tmp_path, photo):
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config).eval()
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 56}, crop_pct=0.875, resample=3)
    model.save_pretrained(tmp_path / "resnet-toy")
    processor.save_pretrained(tmp_path / "resnet-toy")
    network = load_features(str(tmp_path / "resnet-toy"))
    picture = Image.fromarray(photo[:64, :64])
    found, logits = network(canvas.read(picture).image)
    with torch.no_grad():
        inputs = processor(picture, return_tensors="pt")
        theirs = model(**inputs).logits
        pooled = model.resnet(**inputs).pooler_output.flatten(1)
    assert found.shape == (1, 12) and network.figures["frechet"] == "FD-resnet-toy"
    assert torch.allclose(logits, theirs, atol=0.02 * theirs.std().item())
    assert torch.allclose(found, pooled, rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("EfficientNet", {}),
        ("EfficientNet", {"include_top": False}),
        ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "resample": 2}),
        ("EfficientNet", {"resample": 0, "do_center_crop": True, "crop_size": {"height": 50, "width": 50}}),
        ("MobileViT", {"do_flip_channel_order": True}),
        ("ViT", {"do_normalize": False, "rescale_factor": 1 / 128}),
    ],
)
def test_a_classifier_sees_the_pixels_of_its_own_processor(tmp_path, photo, processor, options):
    import transformers

    torch.manual_seed(0)
    config = transformers.EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=3)
    transformers.EfficientNetForImageClassification(config).save_pretrained(tmp_path)
    kind = getattr(transformers, f"{processor}ImageProcessorPil")
    key = {"shortest_edge": 56} if processor == "MobileViT" else {"height": 56, "width": 56}
    kind(size=key, **options).save_pretrained(tmp_path)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if isinstance(module, torch.nn.ZeroPad2d) else None
    )
    try:
        load_features(str(tmp_path))(canvas.read(photo[30:94, 30:94]).image)
    finally:
        hook.remove()
    theirs = kind(size=key, **options)(Image.fromarray(photo[30:94, 30:94]), return_tensors="pt")["pixel_values"]
    assert seen[0].shape == theirs.shape and (seen[0] - theirs).abs().mean() < 0.01 * theirs.std()


def test_only_fids_own_network_gives_fid(work, tmp_path):
    shutil.copy(TOY, tmp_path / "inception.py")
    out = CliRunner().invoke(app, ["evaluate", "identity", "--data", str(work / "data"), "--task", "colorization",
        "--features", f"{tmp_path}/inception.py:four", "--size", "32", "-o", str(tmp_path / "run")])  # fmt: skip
    assert out.exit_code == 0 and "FD-other-inception" in out.output
    assert not {"FID", "KID", "IS", "PD"} & {cell.strip() for cell in out.output.split("|")}


def test_a_network_is_told_by_more_than_its_files_name(work, tmp_path):
    for name, weight in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy.py").write_text(TOY.read_text().replace("manual_seed(0)", f"manual_seed({weight})"))

    def run(features, output, *more):
        return CliRunner().invoke(app, ["evaluate", "identity", "--data", str(work / "data"), "--task", "colorization",
            "--features", features, "--size", "32", "-o", str(tmp_path / output), *more])  # fmt: skip

    def accuracy(output):
        results = json.loads((tmp_path / output / "results.json").read_text())
        return results["rows"][0]["accuracy"], results["figures"]["accuracy"]

    a, b = (f"{tmp_path}/{name}/toy.py:four" for name in "ab")
    assert run(a, "first").exit_code == run(b, "second").exit_code == 0
    assert accuracy("first")[0] != accuracy("second")[0]
    for other in (b, a.replace("four", "nine")):
        refused = run(other, "first")
        assert refused.exit_code == 2 and "holds a run with classifier 'toy " in refused.output
    assert run(a, "both", "--classifier", b).exit_code == 0
    assert accuracy("both")[0] == accuracy("second")[0]
    assert re.fullmatch(r"accuracy \(toy-[0-9a-f]{4}\)", accuracy("both")[1])
    assert run(a, "first", "--classifier", a).exit_code == 0 and accuracy("first")[1] == "accuracy (toy)"


def test_few_photographs_have_no_kernel_distance(work, tmp_path):
    """Subsets of one picture have none; JSON has no NaN."""
    out = invoke(work, "identity", "--task", "colorization", "--count", 7, "-o", tmp_path)
    assert out.exit_code == 0, out.output

    def fail(constant):
        raise AssertionError(constant)

    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=fail)
    assert all("frechet" in row and "kernel" not in row for row in results["rows"])
    assert "KD-toy" not in out.output


def test_features_that_are_not_finite_are_refused(photographs):
    broken = FeatureNetwork("broken", lambda images: (images.mean((2, 3)) / 0, images.mean((2, 3))))
    with pytest.raises(ValueError, match="broken gave features or logits that are not finite"):
        broken(photographs.batch([0]))


def test_a_command_keeps_its_own_braces(work, tmp_path):
    loop = "x=sh -c 'in={inputs}; for f in $in/*.png; do cp \"${f}\" {outputs}/; done; echo {} ${inputs}'"
    out = invoke(work, loop, "--task", "inpainting", "--against", "identity", "-o", tmp_path)
    assert out.exit_code == 0, out.output
    rows = {row["images"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["x"]["frechet"] == rows["degraded"]["frechet"]


def test_the_pages_rows_are_sorted_blanks_last(tmp_path):
    """In a browser: figures that a row lacks stay below, whichever way it is sorted."""
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    values = [3.0, None, -1.5, None, 20.0, 0.25]
    rows = [{"task": "t", "images": f"row {i}", **({} if v is None else {"psnr": {"value": v, "low": v, "high": v}})}
        for i, v in enumerate(values)]  # fmt: skip
    page = pages._PAGE.format(about="", pictures="", table=pages._table(
        {"rows": rows, "figures": {"psnr": "PSNR"}, "notes": []}))  # fmt: skip
    with sync.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.set_content(page)
        for expected in (["2", "5", "0", "4", "1", "3"], ["4", "0", "5", "2", "1", "3"]):
            tab.get_by_role("button", name="PSNR").click()
            assert [cell.split()[1] for cell in tab.locator("tbody td:nth-child(2)").all_inner_texts()] == expected
        browser.close()


def test_a_perfect_restorer_and_another_order_give_the_originals_figures(work, features, tmp_path):
    orders = [list(range(COUNT)), np.random.default_rng(0).permutation(COUNT).tolist()]
    found = []
    for name, order in zip(("in order", "shuffled"), orders, strict=True):
        lists = tmp_path / f"{name}.txt"
        lists.write_text("".join(f"{i}.png {i % 4}\n" for i in order))
        photographs = Photographs(str(work / "images"), 32, names=lists)
        clean = photographs.batch(range(COUNT))
        perfect = Restorer("perfect", lambda batch, clean=clean: clean[[int(n) for n in batch.names]])
        rows = evaluate([perfect], photographs, ["colorization"], features, tmp_path / name, batch=BATCH,
            replicates=5, progress=False)["rows"]  # fmt: skip
        given = {row["images"]: row for row in rows}
        for figure in ("accuracy", "score"):
            assert given["perfect"][figure] == given["originals"][figure]
        assert given["perfect"]["frechet"]["value"] < 1e-6 and given["perfect"]["distance"]["value"] == 0
        assert given["perfect"]["psnr"]["value"] == 100 and given["perfect"]["ssim"]["value"] == pytest.approx(1)
        found.append((given["perfect"], features(clean)[0]))
    (one, first), (other, second) = found
    assert metrics.frechet_distance(first, second) < 1e-6
    for figure in ("accuracy", "score"):
        assert one[figure]["value"] == pytest.approx(other[figure]["value"], rel=1e-5), figure


def test_inception_measures_as_torch_fidelity_does(work, tmp_path, monkeypatch):
    """With random weights of a local file: the loader, the names, and FID and IS of two folders."""
    if _no_inception():
        pytest.skip("torch-fidelity, or a torchvision that fits, is missing")
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        random = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    for parameter in random.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(random.state_dict(), weights)
    monkeypatch.setenv("PALETTE_INCEPTION_WEIGHTS", str(weights))
    network = load_features("inception")
    assert list(network.figures.values()) == ["FID", "KID", "IS", "PD"]
    folders = [tmp_path / "a", tmp_path / "b"]
    found = []
    for folder, factor in zip(folders, (1, 0.6), strict=True):
        folder.mkdir()
        pictures = [Image.open(work / "images" / f"{i}.png").point(lambda v, f=factor: int(v * f)) for i in range(8)]
        for i, picture in enumerate(pictures):
            picture.save(folder / f"{i}.png")
        found.append(network(torch.cat([canvas.read(np.asarray(picture)).image for picture in pictures])))
    theirs = calculate_metrics(input1=str(folders[1]), input2=str(folders[0]), cuda=False, fid=True, isc=True,
        isc_splits=1, verbose=False, cache=False, feature_extractor_weights_path=str(weights))  # fmt: skip
    (features, _), (others, logits) = found
    assert features.shape == (8, 2048)
    assert metrics.frechet_distance(others, features) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    (score,) = metrics.inception_scores([logits])
    assert score - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """Random weights in the form of torchvision's AlexNet, and the layers of its `features`."""
    torch.manual_seed(0)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    layers = torch.nn.Sequential(conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, 1, 2), relu(), pool(3, 2),
        conv(192, 384, 3, 1, 1), relu(), conv(384, 256, 3, 1, 1), relu(), conv(256, 256, 3, 1, 1), relu(),
        pool(3, 2))  # fmt: skip
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    state = {f"features.{name}": weight for name, weight in layers.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, path)
    return path, layers


def test_lpips_equals_torchmetrics(darker, alexnet, monkeypatch):
    from torchmetrics.functional.image import lpips

    path, layers = alexnet
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: layers)
    theirs = lpips._NoTrainLpips(net="alex", pnet_rand=True)
    monkeypatch.setenv("PALETTE_ALEXNET_WEIGHTS", str(path))
    ours = load_lpips()
    a, b = (torch.cat([x[..., :64, :64], x[..., 60:124, 60:124]]) for x in darker[2:])
    assert torch.allclose(ours(a, b), theirs(a, b).flatten(), rtol=1e-4) and ours(a, b).min() > 1e-3
    assert torch.equal(ours(a, a), torch.zeros(2)) and torch.allclose(ours(a, b), ours(b, a))
    assert ours.name == "LPIPS (other weights)"
    monkeypatch.delenv("PALETTE_ALEXNET_WEIGHTS")
    assert load_lpips() is None


def test_lpips_of_pictures_and_of_all_pairs_of_samples(pipe, photographs, features, tmp_path, alexnet):
    from palette_diffusers.evaluation.restorers import from_pipeline

    lpips = Lpips(alexnet[0])
    results = evaluate([from_pipeline(pipe, steps=2)], photographs, ["inpainting"], features, tmp_path, batch=COUNT,
        samples=3, replicates=5, progress=False, lpips=lpips)  # fmt: skip
    (row,) = results["rows"][1:]
    assert results["figures"]["lpips_spread"] == "LPIPS (other weights) between samples"
    clean = photographs.batch(range(COUNT))
    given = degrade_all("inpainting", clean)
    samples = [
        metrics.eight_bits(from_pipeline(pipe, steps=2)(Batch("inpainting", [""] * COUNT, given, seeds)))
        for seeds in ([sampling_seed(k, 0, sample) for k in range(COUNT)] for sample in range(3))
    ]
    assert row["lpips"]["value"] == pytest.approx(lpips(samples[0], clean).mean().item(), rel=1e-4)
    for name, measure in (
        ("lpips_spread", lpips),
        ("ms_ssim", metrics.ms_ssim),
        ("spread", lambda a, b: (features(a)[0] - features(b)[0]).norm(dim=1)),
    ):
        pairs = [measure(samples[i], samples[j]).mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
        assert row[name]["value"] == pytest.approx(np.mean(pairs), rel=1e-4), name


def degrade_all(variant, clean):
    return Given.cat([degrade(variant, one, i) for i, one in enumerate(clean.split(1))])


@pytest.mark.parametrize(("content", "words"), [(None, "is no file"), (b"no", "holds no state dict"),
    ({"features.0.weight": 1}, "holds no state dict"), ([], "holds no state dict")])  # fmt: skip
def test_other_weights_than_alexnets_are_one_line(work, tmp_path, monkeypatch, content, words):
    path = tmp_path / "alexnet.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    monkeypatch.setenv("PALETTE_ALEXNET_WEIGHTS", str(path))
    out = invoke(work, "identity", "--task", "colorization", "-o", tmp_path / "run")
    line = out.output.strip().splitlines()[-1]
    assert out.exit_code == 2 and line.startswith(f"palette: {path}") and words in line, out.output


def test_a_restorer_is_told_by_its_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    found = load_restorer(f"twin={tmp_path}/model", PalettePipeline.from_pretrained, 3)
    assert (found.name, found.about["steps"], found.stochastic) == ("twin", 3, True)
    assert load_restorer("telea", PalettePipeline.from_pretrained).handles("inpainting")
    assert not load_restorer("telea", PalettePipeline.from_pretrained).handles("colorization")
    with pytest.raises(ValueError, match="knows colorization"):
        found.check("paired", [])
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    Image.new("RGB", (32, 32)).save(tmp_path / "run" / "batch.png")
    with pytest.raises(FileNotFoundError, match=f"training run's folder: name its {tmp_path}/run/pipeline"):
        load_restorer(f"{tmp_path}/run", PalettePipeline.from_pretrained)


def test_given_is_not_changed_by_a_restorer(photographs):
    given = degrade("inpainting", photographs.batch([0]), 0)
    assert isinstance(given, Given)
    from palette_diffusers.evaluation.inputs import Batch

    before = given.known.clone()
    filled = baseline("telea")(Batch("inpainting", ["00000"], given, [0]))
    assert torch.equal(given.known, before) and not torch.equal(filled, before)
    keep = given.mask.expand_as(filled) == 0
    assert torch.allclose(filled[keep], before[keep], atol=1e-6)
