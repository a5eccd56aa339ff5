"""The claims' harness at toy size, on generated pictures."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.claims import gan, pages, verdicts  # noqa: E402
from benchmarks.claims.runs import RUNS, Scale, settings_of  # noqa: E402
from palette_diffusers import PalettePipeline  # noqa: E402

NETWORK = dict(block_out_channels=[8, 8, 16], norm_num_groups=4, attention_head_dim=8)
COUNT, SIZE = 12, 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve generated pictures of four classes, to train on and to measure."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder, rng = tmp_path_factory.mktemp("claims"), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).resize((SIZE, SIZE)) for _ in range(COUNT)]
    columns = Features({"image": ImageFeature(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": pictures, "label": [i % 4 for i in range(COUNT)]}, columns)
    for split in ("train", "validation"):
        rows.to_parquet(folder / f"{split}-0.parquet")
    return folder


def command(data, work, claims):
    return [sys.executable, "-m", "benchmarks.claims.run", "--claim", claims, "--data", str(data), "--steps", "2",
        "--workers", "0", "--batch", "2", "--stages", "2", "--size", str(SIZE), "--network", json.dumps(NETWORK),
        "--count", str(COUNT), "--features", f"{ROOT}/tests/toy.py:Colors",
        "--folder", str(work), "--output", str(work / "results")]  # fmt: skip


def test_every_claim_goes_on_after_a_kill(data, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(data, tmp_path, "a,b"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    first = tmp_path / "runs" / "regression 0" / "pipeline-0000001"
    begin = time.time()
    while not first.is_dir() and process.poll() is None and time.time() - begin < 60:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "diffusion 0").glob("pipeline-*/unet/*")}
    assert kept and not (tmp_path / "results" / "a.json").exists()
    done = subprocess.run(command(data, tmp_path, "a,b"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())

    results = {letter: json.loads((tmp_path / "results" / f"{letter}.json").read_text()) for letter in "ab"}
    for letter, one in results.items():
        assert [t["run"] for t in one["trained"]] == list(verdicts.CLAIMS[letter].runs)
    for letter, one in results.items():
        assert len(one["verdicts"]) == len(verdicts.CLAIMS[letter].comparisons)
        assert f"## Claim {letter}" in done.stdout and all(v["verdict"] in done.stdout for v in one["verdicts"])
    assert {row["step"] for row in results["a"]["stages"]} == {1, 2}
    specialist = [row["task"] for row in results["b"]["rows"] if row["images"] == "specialist 0"]
    assert len(specialist) == len(set(specialist)) == 6
    spread = {row["images"]: row["spread"]["value"] for row in results["a"]["rows"] if row["task"] == "inpainting"}
    assert spread["regression 0"] == 0 < spread["diffusion 0"]
    pages.draw(list(results.values()), tmp_path / "claims.png")
    assert Image.open(tmp_path / "claims.png").width > 1000


def test_gan_losses_have_their_closed_form():
    clean = torch.zeros(2, 3, 4, 4)
    image = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.5)])
    mask = torch.ones(2, 1, 4, 4)
    mask[1, :, 2:] = 0
    image[1, :, 2:] = 9  # outside of the hole nothing counts
    losses = gan.generator_losses(torch.zeros(2, 1, 3, 3), image, clean, mask)
    assert losses.tolist() == pytest.approx([math.log(2) + 25, math.log(2) + 50])
    real, fake = torch.full((2, 1, 3, 3), 1.0), torch.full((2, 1, 3, 3), -2.0)
    expected = -0.5 * (math.log(1 / (1 + math.exp(-1))) + math.log(1 - 1 / (1 + math.exp(2))))
    assert gan.discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert gan.PatchDiscriminator(4)(torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64)).shape == (1, 1, 14, 14)


def test_gan_resumed_is_gan_in_one_go(data, tmp_path):
    scale = Scale(4, batch=2, size=SIZE, network=NETWORK, workers=0)
    folders = tmp_path / "once", tmp_path / "twice"
    once, twice = (settings_of(RUNS["GAN"], str(data), folder, 0, scale, steps=4) for folder in folders)
    gan.train(once)
    gan.train(replace(twice, steps=2))
    gan.train(twice)
    a, b = (PalettePipeline.from_pretrained(folder / "pipeline").unet.state_dict() for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = PalettePipeline.from_pretrained(gan.train(replace(once, output=str(tmp_path / "new"), steps=1)))
    assert any(not torch.equal(a[name], weight) for name, weight in start.unet.state_dict().items())
    with pytest.raises(ValueError, match="rate was 0.0008, now 0.1"):
        gan.train(replace(twice, rate=0.1))


def test_a_pipeline_of_one_step_is_the_generator(data, tmp_path):
    """What is measured is what was trained: the same network at the same level, from the same noise."""
    scale = Scale(4, batch=2, size=SIZE, network=NETWORK, workers=0)
    settings = settings_of(RUNS["GAN"], str(data), tmp_path / "gan", 0, scale, steps=2)
    pipe = PalettePipeline.from_pretrained(gan.train(settings))
    pipe.set_progress_bar_config(disable=True)
    from palette_diffusers.evaluation.inputs import degrade
    from palette_diffusers.tasks import get_task, network_condition

    given = degrade("inpainting", torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)), 0)
    noise = torch.randn(given.known.shape, generator=torch.Generator().manual_seed(1))
    batch = {"noise": noise, "gamma": torch.ones(1), "condition": network_condition(given, True)}
    with torch.no_grad():
        image = gan.generate(pipe.unet, batch).clamp(-1, 1)
    sample = pipe.denoise(given, latents=noise, task=get_task("inpainting"))
    hole = given.mask.expand_as(image) > 0
    assert torch.allclose(sample[hole], image[hole], atol=1e-5) and image[hole].std() > 0


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ("lower", ["lower", "lower"], "holds"),
        ("lower", ["lower", "same"], "undecided"),
        ("lower", ["lower", "higher"], "does not"),
        ("higher", ["higher", "lower"], "does not"),
        ("same", ["same", "lower"], "does not"),
        ("no higher", ["no higher", "lower"], "holds"),
        ("same", ["same", "unclear"], "undecided"),
        ("no higher", ["lower", "unclear"], "undecided"),
    ],
)
def test_verdicts(expected, found, said):
    assert verdicts.verdict(expected, found) == said


def test_seeds_that_disagree_decide_nothing():
    def row(low):
        return {"frechet": {"value": low + 0.5, "low": low, "high": low + 1}}

    comparison = verdicts.Comparison("", "a", "b", "frechet", "lower", ("t",))
    rows = {("t", "a 0"): row(1), ("t", "b 0"): row(3), ("t", "a 1"): row(5), ("t", "b 1"): row(3)}
    assert verdicts.outcomes(comparison, rows, [0]) == {"t": "lower"}
    assert verdicts.outcomes(comparison, rows, [1]) == {"t": "higher"}
    assert verdicts.outcomes(comparison, rows, [0, 1]) == {"t": "unclear"}


def test_overlapping_intervals_alone_are_not_sameness():
    def outcome(value, expected="same"):
        rows = {("t", "a 0"): {"spread": {"value": value, "low": 1, "high": 9}}, ("t", "b 0"): {"spread": other}}
        return verdicts.outcomes(verdicts.Comparison("", "a", "b", "spread", expected, ("t",)), rows, [0])["t"]

    other = {"value": 5.0, "low": 2, "high": 8}
    assert [outcome(value) for value in (4.4, 4.6, 5.4, 5.6)] == ["unclear", "same", "same", "unclear"]
    found = [outcome(value, "no higher") for value in (4.4, 5.4, 5.6)]  # being better is no reason for doubt
    assert found == ["no higher", "no higher", "unclear"]


@pytest.mark.parametrize(
    ("evaluations", "distance", "said"),
    [(4, 7.1, "lower"), (8, 6.0, "same"), (16, 6.0, "higher"), (4, 7.2, "unclear")],
)
def test_a_solver_that_is_as_good_is_told_by_its_evaluations(evaluations, distance, said):
    points = [(verdicts.PAPER, 8, 7.0), (verdicts.PAPER, 1000, 7.01), ("UniPC, even in time", evaluations, distance)]
    found = verdicts.decide_steps([{"task": "t", "solver": s, "evaluations": n, "distance": d} for s, n, d in points])
    assert found["outcomes"] == {"t": said}
    assert found["verdict"] == {"lower": "holds", "higher": "does not"}.get(said, "undecided")
    assert found["evaluations"]["t"]["paper"] == [8, 7.0]


def test_the_page_shows_the_results():
    """README.md is what pages.py makes of results/*.json; its verdicts follow from their rows."""
    results = pages.read()
    readme = (pages.HERE / "README.md").read_text()
    assert results
    for one in results:
        assert pages.markdown(one) in readme
        if one["claim"] == "e":
            assert one["verdicts"] == [verdicts.decide_steps(one["rows"])]
            continue
        rows = {(row["task"], row["images"]): row for row in one["rows"]}
        assert one["verdicts"] == verdicts.decide(verdicts.CLAIMS[one["claim"]], rows, one["seeds"])
