"""Publishing and loading over real HTTP, to and from a hub on this machine, in processes of their own."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from conftest import toy_unet
from hub_server import TOKEN, Repo, serve
from huggingface_hub import HfApi, ModelCard, SpaceCard, constants
from PIL import Image
from safetensors.torch import load_file

from palette_diffusers import PalettePipeline, PaletteScheduler, space, training
from palette_diffusers import hub as hub_module
from palette_diffusers.bundle import FILES, bundle
from palette_diffusers.evaluation.store import weights_content
from palette_diffusers.files import new_folder
from palette_diffusers.hub import EditedCard, measured, publish, read_evaluation, write_weights
from palette_diffusers.report import write_card
from palette_diffusers.settings import TrainSettings
from palette_diffusers.space import publish_space
from palette_diffusers.tasks import _TASKS, Task

ROOT = Path(__file__).parents[1]
NAME = "me/palette-v1.0"  # a dot, as versions have: loaders make module names of it

FILES_EXPECTED = {
    ".gitattributes", "README.md", "SHA256SUMS", "samples.png", "model_index.json", "palette_pipeline.py",
    "scheduler/scheduler_config.json", "scheduler/palette_scheduler.py",
    "unet/config.json", "unet/palette_unet.py",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
}  # fmt: skip


def small_pipe(seed: int = 0) -> PalettePipeline:
    pipe = PalettePipeline(toy_unet(seed), PaletteScheduler(sampling_spacing="logsnr"), default_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, path) -> str:
    """The digest of the picture that seed 3 makes."""
    image = pipe(str(path), task="colorization", generator=torch.Generator().manual_seed(3)).images[0]
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def hub():
    with serve() as running:
        yield running


@pytest.fixture
def online(hub, monkeypatch):
    """The hub, for this process."""
    here = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in (here | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A training run's folder with what must never be uploaded, a photograph and an evaluation."""
    from skimage import data

    folder = tmp_path_factory.mktemp("place")
    Image.fromarray(data.astronaut()[:80, 150:250]).save(folder / "photo.png")
    small_pipe().save_pretrained(folder / "run" / "pipeline")
    (folder / "run" / "settings.json").write_text(json.dumps({"init": ""}))
    (folder / "run" / "samples").mkdir()
    for number in (1, 2):
        (folder / "run" / "samples" / f"step-{number:07d}.png").write_bytes(b"sheet %d" % number)
    (folder / "run" / "step-0000010.pt").write_bytes(b"optimiser")
    (folder / "run" / "pipeline" / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "run" / "pipeline" / "unet" / "optimizer.pt").write_bytes(b"optimiser")
    figures = {"Palette": {"PSNR": 21.5}, "degraded": {"PSNR": 20.0}}
    report = {"count": 7, "dataset": "me/photos", "results": {"colorization": figures}}
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


def run(hub, home, *arguments, code: str | None = None, check: bool = True, **more: str):
    """A process whose hub is ours and whose cache is `home`."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        **more,
    }
    command = ["-c", code] if code else ["-m", "palette_diffusers.cli"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)], env=environment, cwd=home, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def published(hub, place):
    """What the command printed; the first upload is cut off on the way."""
    hub.drop_uploads = 1
    done = run(
        hub, place, "publish", "run", NAME, "--license", "cc0-1.0", "--dataset", "me/photos", "--base-model",
        "me/base", "--evaluation", "evaluation.json", "--photo", "photo.png",
    )  # fmt: skip
    return done.stdout.strip()


def test_one_commit_of_what_is_listed(hub, published):
    assert published == f"{hub.url}/{NAME}"
    files = hub.repos[NAME].files()
    assert set(files) == FILES_EXPECTED
    assert sum("/commit/main" in line for line in hub.log) == 1
    uploads = [line for line in hub.log if line.startswith("PUT")]
    assert len(uploads) == 4 and len(set(uploads)) == 3  # the one that was cut off came again
    content = b"".join(files.values())
    assert b"optimiser" not in content and b"hf_secret" not in content and TOKEN.encode() not in content


def test_sums_hold(hub, published, tmp_path):
    for name, content in hub.repos[NAME].files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(FILES_EXPECTED) - 2
    full = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    half = load_file(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(half[name], value.half()) and value.dtype == torch.float32 for name, value in full.items())


def test_card(hub, published):
    card = ModelCard(hub.repos[NAME].files()["README.md"].decode())
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc0-1.0", "diffusers", "image-to-image")
    assert data.datasets == ["me/photos"] and data.base_model == "me/base" and "colorization" in data.tags
    result = data.eval_results[0]
    assert (result.task_name, result.metric_name, result.metric_value) == ("colorization", "PSNR", 21.5)
    assert "| colorization | PSNR | 21.5 |" in card.text and "samples.png" in card.text and NAME in card.text


def test_loads_without_the_package(hub, published, place, tmp_path):
    """Also what has a solver of diffusers' own, and the shipped student. The package's name is blocked, because an
    editable install would be found even by `python -I`."""
    fast = small_pipe()
    fast.scheduler = diffusers.UniPCMultistepScheduler.from_config(fast.scheduler.config)
    fast.save_pretrained(tmp_path / "fast")
    code = """
from palette_diffusers.hub import publish
publish("fast", "me/fast")
publish("starter-few-steps", "me/student")
"""
    run(hub, tmp_path, code=code)
    code = f"""
import sys
sys.modules["palette_diffusers"] = None
from diffusers import DiffusionPipeline
import numpy, torch
for name in ("{NAME}", "me/fast", "me/student"):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    generator = torch.Generator().manual_seed(3)
    image = pipe({str(place / "photo.png")!r}, task="colorization", generator=generator).images[0]
    assert type(pipe).__name__ == "PalettePipeline" and not type(pipe).__module__.startswith("palette_diffusers")
    numpy.save(name.split("/")[-1] + ".npy", numpy.asarray(image))
    pipe.register_to_config(student="starter-few-steps", few_steps=None)  # which this code has not
    assert pipe.speed("fast").config.default_steps == 4 and pipe.load_student() is None
"""
    done = run(hub, tmp_path, code=code, PYTHONPATH="")
    pipes = [PalettePipeline.from_pretrained(name) for name in (place / "run" / "pipeline", tmp_path / "fast")]
    pipes.append(PalettePipeline.from_pretrained("starter-few-steps"))
    for name, pipe in zip((NAME, "fast", "student"), pipes, strict=True):
        generator = torch.Generator().manual_seed(3)
        image = pipe(str(place / "photo.png"), task="colorization", generator=generator).images[0]
        here, there = np.asarray(image).astype(int), np.load(tmp_path / f"{name.split('/')[-1]}.npy").astype(int)
        # matrix products may round otherwise where weights lie elsewhere in memory
        assert abs(here - there).max() <= 1 and (here != there).mean() < 1e-3
    assert "Expected types" not in done.stderr


@pytest.mark.parametrize("kind", ["a folder", "me/student", "starter-few-steps"])
def test_a_student_of_this_machine_is_not_published(tmp_path, kind):
    pipe, name = small_pipe(), str(tmp_path / "student") if kind == "a folder" else kind
    small_pipe(1).save_pretrained(tmp_path / "student")
    pipe.register_to_config(student=name)
    write_weights(pipe, tmp_path / "out")
    text = (tmp_path / "out" / "model_index.json").read_text()
    assert json.loads(text)["student"] == (None if kind == "a folder" else name) and str(tmp_path) not in text


def test_login_as_the_readme_says(hub, place, tmp_path):
    """`hf auth login`, then publish: no token by the environment, and before it a line that says what to do."""
    command = ["publish", place / "run", "me/login"]
    home = {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    refused = run(hub, tmp_path, *command, check=False, **home)
    assert refused.returncode == 2 and "log in (hf auth login)" in refused.stderr.splitlines()[-1]
    environment = os.environ | {"HF_ENDPOINT": hub.url, **home}
    subprocess.run([Path(sys.executable).with_name("hf"), "auth", "login"], env=environment, check=True)
    assert run(hub, tmp_path, *command, **home).stdout.split()[-1] == f"{hub.url}/me/login"


def test_a_run_is_pushed_when_it_is_done(hub, folder, tmp_path):
    """Nothing is trained where nothing could be pushed; a run that was stopped is not pushed; what a failed upload
    leaves is a whole run, and the command that uploads it."""
    code = f"""
import sys
from test_training import settings
from palette_diffusers import hub, training
def cut_off(*_):
    raise OSError("the line is dead")
name, changes = sys.argv[1], eval(sys.argv[2])
if changes.pop("cut_off", False):
    hub.upload = cut_off
training.parse = lambda **_: settings({str(folder)!r}, "run", push_to_hub=name, steps=2, tracker="none", **changes)
training.main()
"""

    def push(name="me/pushed", check=True, changes=None, **more):
        return run(hub, tmp_path, name, changes or {}, code=code, check=check, **more)

    for why, name, message in (({"HF_TOKEN": ""}, "me/pushed", "hf auth login"), ({}, "no name", "no name")):
        refused = push(name, check=False, **why)
        assert refused.returncode == 2 and message in refused.stderr and not list(tmp_path.glob("run/step-*"))
    assert "stopped at step 1 of 2" in push(changes={"max_hours": 1e-9}).stdout
    assert "me/pushed" not in hub.repos
    failed = push(check=False, changes={"resume": True, "cut_off": True})
    assert failed.returncode == 2 and "the upload failed: the line is dead" in failed.stderr
    assert "palette publish run me/pushed" in failed.stderr and (tmp_path / "run" / "report.html").is_file()
    assert push(changes={"resume": True}).stdout.splitlines()[-1] == f"{hub.url}/me/pushed"
    assert "me/pushed" in hub.repos


LOADING = f"""
import json, sys, torch
from pathlib import Path
from palette_diffusers import PalettePipeline
from test_hub import sample

photo, first, out = sys.argv[1], sys.argv[2], {{}}

def attempt(label, *arguments, **options):
    try:
        pipe = PalettePipeline.from_pretrained(*arguments, **options)
        pipe.set_progress_bar_config(disable=True)
        out[label] = [str(pipe.unet.dtype), sample(pipe, photo)]
    except (ValueError, OSError) as error:
        out[label] = f"{{type(error).__name__}}: {{error}}"

attempt("plain", "{NAME}")
attempt("revision", "{NAME}", revision=first)
attempt("variant", "{NAME}", variant="fp16", dtype=torch.float32, cache_dir="other")
attempt("low", "{NAME}", dtype=torch.bfloat16, local_files_only=True)
attempt("no such variant", "{NAME}", variant="bf16")
attempt("no such revision", "{NAME}", revision="v9")
attempt("no token", "me/private", token=False)
attempt("private", "me/private")
attempt("gated", "me/gated", token=False)
attempt("not found", "me/nothing")
attempt("no name", "no name at all")
attempt("wrong class", "me/other")
attempt("too new", "me/newer")
attempt("never loaded", "me/nothing", local_files_only=True)

blob = next(Path("hub").glob("models--me--palette*/snapshots/*/unet/diffusion_pytorch_model.safetensors")).resolve()
blob.write_bytes(blob.read_bytes()[:5000])
attempt("truncated, offline", "{NAME}", local_files_only=True)
attempt("truncated", "{NAME}")
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_loads_with_the_package(hub, published, place, cache):
    """Every way in one process, with what is said where it can't be done."""
    repo = hub.repos[NAME]
    files = repo.files()
    index = json.loads(files["model_index.json"])
    hub.repos["me/private"] = Repo(private=True)
    hub.repos["me/private"].commit(files)
    hub.repos["me/gated"] = Repo(gated=True)
    hub.repos["me/gated"].commit(files)
    for name, change in (("me/other", {"_class_name": "DDPMPipeline"}), ("me/newer", {"_format": 99})):
        hub.repos[name] = Repo()
        hub.repos[name].commit(files | {"model_index.json": json.dumps(index | change).encode()})
    hub.truncate = 1
    begin = len(hub.log)
    done = run(hub, cache, place / "photo.png", repo.refs["main"], code=LOADING)
    out = json.loads(done.stdout.splitlines()[-1])
    assert not any(line.endswith(".py") for line in hub.log[begin:])  # no code is even downloaded
    assert hub.truncate == 0  # the first download was cut off in the middle
    picture = sample(small_pipe(), place / "photo.png")
    for label in ("plain", "revision", "private", "truncated"):
        assert out.pop(label) == ["torch.float32", picture], label
    rounded = small_pipe()
    rounded.unet.half().float()
    assert out.pop("variant") == ["torch.float32", sample(rounded, place / "photo.png")]
    assert out.pop("low")[0] == "torch.bfloat16"
    says = {
        "no such variant": ("ValueError", "variant=bf16", "no variant, variant='fp16'"),
        "no such revision": ("FileNotFoundError", "no revision 'v9'"),
        "no token": ("FileNotFoundError", "me/private", "log in"),
        "gated": ("PermissionError", "gated", "accept its terms"),
        "not found": ("FileNotFoundError", "me/nothing", "no such repository"),
        "no name": ("FileNotFoundError", "no name of a repository"),
        "wrong class": ("ValueError", "DDPMPipeline", "expected a PalettePipeline"),
        "too new": ("ValueError", "format 99", "upgrade"),
        "never loaded": ("FileNotFoundError", "not in the cache"),
        "truncated, offline": ("OSError", "incomplete"),
    }
    assert set(out) == set(says)
    for label, parts in says.items():
        assert all(part in out[label] for part in parts), (label, out[label])


def test_offline(hub, published, place, cache):
    """No hub answers: what the test above loaded is in the cache, the rest is refused in one line."""
    code = f"""
import sys
from palette_diffusers import PalettePipeline
from palette_diffusers.cli import app
from test_hub import sample
pipe = PalettePipeline.from_pretrained("{NAME}")
print(sample(pipe, sys.argv[1]))
app(["info", "--model", "me/nothing"])
"""
    done = run(hub, cache, place / "photo.png", code=code, check=False, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.split()[-1] == sample(small_pipe(), place / "photo.png")
    said = [line for line in done.stderr.splitlines() if line.startswith("palette: ")]
    assert done.returncode == 2 and len(said) == 1 and "not in the cache" in said[0]


AGAIN = """
import json, sys
from palette_diffusers.hub import publish

def attempt(*arguments, **options):
    try:
        return publish(*arguments, **options)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"

pipeline = sys.argv[1] + "/pipeline"
print(json.dumps([
    attempt(pipeline, "me/again", private=True, max_shard_size="200KB"),
    attempt(pipeline, "me/again", private=True),
    attempt(pipeline, "me/again", create_pr=True, license="mit"),
    attempt(pipeline, "me/edited"),
    attempt(pipeline, "me/edited", overwrite_card=True),
    attempt(pipeline, "me/edited", private=True),
    attempt(pipeline, "me/again", token="hf_wrong"),
]))
"""


def test_published_again(hub, published, place, tmp_path):
    hub.repos["me/edited"] = Repo()
    hub.repos["me/edited"].commit(hub.repos[NAME].files() | {"README.md": b"edited by hand"})
    done = run(hub, tmp_path, place / "run", code=AGAIN)
    first, second, proposed, kept, replaced, public, refused = json.loads(done.stdout.splitlines()[-1])
    repo = hub.repos["me/again"]
    commits = list(repo.commits.values())
    assert first == second == f"{hub.url}/me/again" and repo.private
    assert sum("model-0" in name for name in commits[1]) > 1
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in commits[1]
    assert not any("-of-" in name for name in commits[2])  # files of the first that the second lacks are gone
    assert proposed == f"{hub.url}/me/again/discussions/1"
    assert "license: mit" in commits[3]["README.md"].decode() and "mit" not in commits[2]["README.md"].decode()[:80]
    assert kept.startswith("EditedCard: the card of me/edited was edited") and replaced == f"{hub.url}/me/edited"
    assert b"edited by hand" not in hub.repos["me/edited"].files()["README.md"]
    assert "public" in public and "401" in refused


def test_a_new_folder_is_filled(tmp_path, monkeypatch):
    """Where it is the working directory, a link or not there; and removed where it could not be."""
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path("."), tmp_path / "link", Path("more/new")):
        with new_folder(folder) as part:
            (part / "folder").mkdir()
            (part / "folder" / "file").touch()
        assert (folder / "folder" / "file").is_file()
    assert os.listdir() == os.listdir(tmp_path / "here") and (tmp_path / "link").is_symlink()
    with pytest.raises(KeyError), new_folder(Path("no")) as part:
        raise KeyError
    assert not list(tmp_path.rglob(".palette-*")) and not Path("no").exists()


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A package of one module, in place of this one's files."""
    (tmp_path / "palette_diffusers").mkdir()
    (tmp_path / "palette_diffusers" / "demo.py").write_text("1")
    monkeypatch.setattr(space, "PACKAGE", tmp_path / "palette_diffusers")
    return tmp_path / "palette_diffusers"


def test_a_space_is_published_again(online, small_package):
    assert publish_space("me/demo", model="me/mine") == f"{online.url}/spaces/me/demo"
    repo = online.repos["spaces/me/demo"]
    assert repo.variables == {"PALETTE_MODEL": {"value": "me/mine"}} and not repo.private
    with pytest.raises(ValueError, match="me/demo exists and is public, a private one was asked for"):
        publish_space("me/demo", private=True)
    assert len(repo.commits) == 2 and repo.variables
    (small_package / "demo.py").rename(small_package / "page.py")
    publish_space("me/demo")
    names = {name for name in repo.files() if name.startswith("palette_diffusers/")}
    assert names == {"palette_diffusers/page.py"} and not repo.variables


def test_the_model_of_a_space(online, small_package, tmp_path, monkeypatch):
    """A shipped one is on no card; a folder of this machine is refused."""
    for name, variables in (("starter-few-steps", ["starter-few-steps"]), ("starter", [])):
        publish_space("me/shipped", model=name)
        repo = online.repos["spaces/me/shipped"]
        assert [variable["value"] for variable in repo.variables.values()] == variables
        assert SpaceCard(repo.files()["README.md"].decode()).data.models is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="model is 'runs/a', a folder of this machine: publish it"):
        publish_space("me/local", model="runs/a")
    assert "spaces/me/local" not in online.repos


def test_what_a_space_has_of_its_own_is_kept(online, small_package):
    """A card that was edited on the Hub, also where no checksums tell of the publication; and files of its own."""
    publish_space("me/edited-demo", private=True)
    repo = online.repos["spaces/me/edited-demo"]
    files = repo.files() | {"README.md": b"edited by hand", "notes.txt": b"", "palette_diffusers/old.py": b""}
    for there in (files, {name: data for name, data in files.items() if name != "SHA256SUMS"}):
        repo.commit(there)
        with pytest.raises(ValueError, match="the card of me/edited-demo was edited"):
            publish_space("me/edited-demo")
    assert repo.private and repo.files()["README.md"] == b"edited by hand"
    publish_space("me/edited-demo", overwrite_card=True)
    assert SpaceCard(repo.files()["README.md"].decode()).data.title == "Palette"
    assert "notes.txt" in repo.files() and "palette_diffusers/old.py" not in repo.files()


def test_an_evaluations_table_is_read(tmp_path):
    """results.json of `palette evaluate` and what `benchmarks/quality.py --output` makes of it say the same."""
    figure = {"value": 3.25, "low": 3.0, "high": 3.5}
    table = {
        "settings": {"count": 7, "data": "photos"},
        "figures": {"frechet": "FD-classifier", "accuracy": "accuracy (classifier)"},
        "rows": [
            {"task": "originals", "images": "originals", "accuracy": figure},
            {"task": "inpainting", "images": "Palette", "about": {}, "frechet": figure},
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(table))
    report = read_evaluation(tmp_path / "results.json")
    assert (report["count"], report["dataset"]) == (7, "photos")
    assert measured(report).splitlines()[-1] == "| inpainting | FD-classifier | 3.25 |"


def test_figures_are_finite_numbers(tmp_path):
    figures = {"PSNR": 21.5, "SSIM": float("nan"), "FID": float("inf"), "sound": True, "note": "good"}
    (tmp_path / "e.json").write_text(json.dumps({"results": {"colorization": {"Palette": figures}}}))
    assert measured(read_evaluation(tmp_path / "e.json")).splitlines()[2:] == ["| colorization | PSNR | 21.5 |"]


def test_a_single_name_is_a_list_of_one(place, tmp_path):
    card = card_of(place / "run", tmp_path, datasets="me/photos", photos=str(place / "photo.png"))
    assert "datasets:\n- me/photos\n" in card and (tmp_path / "tree-0" / "samples.png").is_file()


@pytest.mark.parametrize("name", ["noslash", "bad//name", "a/b/c", "me/", "me/na me"])
def test_a_name_is_checked_before_anything_is_made(online, place, tmp_path, monkeypatch, name):
    def nothing(*_, **__):
        raise AssertionError

    monkeypatch.setattr(HfApi, "create_repo", nothing)
    ways = [
        lambda: publish(place / "run", name),
        lambda: publish(place / "run", name, dry_run=tmp_path / "tree"),
        lambda: publish_space(name),
        lambda: publish_space("me/demo", model=name),
        lambda: training._check_hub(TrainSettings(push_to_hub=name)),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="USER/NAME|[Rr]epo"):
            way()
    assert not (tmp_path / "tree").exists()


def test_a_card_that_was_edited_is_told_before_the_training(online, monkeypatch):
    online.repos["me/mine"] = Repo()
    online.repos["me/mine"].commit({"README.md": b"edited by hand"})
    settings = TrainSettings(output="run", push_to_hub="me/mine")
    advice = "palette publish run me/mine --overwrite-card"
    with pytest.raises(ValueError, match=f"the card of me/mine was edited on the Hub: .*{advice}"):
        training._check_hub(settings)
    training._check_hub(replace(settings, push_to_hub="me/new"))

    def edited_since(*_):
        raise EditedCard("edited since")

    monkeypatch.setattr(hub_module, "publish", edited_since)
    with pytest.raises(OSError, match=advice):
        training._push(settings, Path("run/pipeline"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the Hub refuses"):
        training._check_hub(settings)


def test_each_task_has_figures_of_its_own_in_the_index(place, tmp_path):
    figures = {"colorization": {"Palette": {"PSNR": 21.5}}, "inpainting": {"Palette": {"PSNR": 18.25}}}
    (tmp_path / "e.json").write_text(json.dumps({"dataset": "me/photos", "results": figures}))
    publish(place / "run", NAME, license="mit", dry_run=tmp_path / "tree", evaluation=tmp_path / "e.json")
    data = ModelCard.load(tmp_path / "tree" / "README.md").data
    assert {(r.task_name, r.metric_value) for r in data.eval_results} == {("colorization", 21.5), ("inpainting", 18.25)}


def test_only_this_models_figures_are_on_its_card(place, tmp_path):
    """Of an evaluation of several, by the weights that it noted; those of others alone are refused."""
    pipe, figure = small_pipe(), lambda value: {"value": value, "low": 0, "high": 99}
    own = weights_content({name: value.bfloat16() for name, value in pipe.unet.state_dict().items()})
    about = {"solver": "PaletteScheduler", "steps": 7, "dtype": "bfloat16", "weights": own}
    rows = [
        {"task": "colorization", "images": "Palette", "about": {"weights": "another"}, "psnr": figure(1)},
        {"task": "inpainting", "images": "Palette", "about": {"weights": "another"}, "psnr": figure(1)},
        {"task": "colorization", "images": "mine", "about": about, "psnr": figure(2)},
    ]
    table = {"settings": {"count": 7, "data": "photos"}, "figures": {"psnr": "PSNR"}, "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps(table))
    publish(place / "run", NAME, license="mit", dry_run=tmp_path / "tree", evaluation=tmp_path / "results.json")
    card = ModelCard.load(tmp_path / "tree" / "README.md")
    assert [r.metric_value for r in card.data.eval_results] == [2.0] and "| inpainting |" not in card.text
    assert "7 images a task (steps 7, solver PaletteScheduler, dtype bfloat16)" in card.text
    (tmp_path / "results.json").write_text(json.dumps(table | {"rows": rows[:2]}))
    with pytest.raises(ValueError, match="figures of other weights .Palette., none of this"):
        publish(place / "run", NAME, license="mit", dry_run=tmp_path / "no", evaluation=tmp_path / "results.json")


def test_dry_run_is_what_is_published(hub, published, place, tmp_path):
    options = dict(license="cc0-1.0", datasets=["me/photos"], base_model="me/base")
    folder = publish(
        place / "run", NAME, dry_run=tmp_path / "tree", evaluation=place / "evaluation.json",
        photos=[place / "photo.png"], **options,
    )  # fmt: skip
    written = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    online = dict(hub.repos[NAME].files())
    del online[".gitattributes"]
    assert written == online
    assert sample(PalettePipeline.from_pretrained(folder), place / "photo.png") == sample(
        small_pipe(), place / "photo.png"
    )
    assert str(place).encode() not in b"".join(online.values())
    with pytest.raises(ValueError, match="not empty"):
        publish(place / "run", NAME, dry_run=folder)
    with pytest.raises(ValueError, match="no LICENSE"):
        publish(place / "run", NAME, license="other", dry_run=tmp_path / "new")
    (tmp_path / "empty.json").write_text('{"results": {"colorization": {}}}')
    with pytest.raises(ValueError, match="no evaluation"):
        publish(place / "run", NAME, evaluation=tmp_path / "empty.json", dry_run=tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="holds no pipeline"):
        publish(place, NAME, dry_run=tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.json", "tree"]  # nothing half-written stays


def test_the_sheet_of_a_run_is_published_only_when_asked_for(place, tmp_path):
    publish(place / "run", NAME, dry_run=tmp_path / "without")
    assert not (tmp_path / "without" / "samples.png").exists()
    publish(place / "run", NAME, sheet=True, dry_run=tmp_path / "with")
    assert (tmp_path / "with" / "samples.png").read_bytes() == b"sheet 2"
    with pytest.raises(ValueError, match="sheet and photos"):
        publish(place / "run", NAME, sheet=True, photos=place / "photo.png", dry_run=tmp_path / "both")
    with pytest.raises(FileNotFoundError, match="no sheet"):
        publish("starter", NAME, sheet=True, dry_run=tmp_path / "starter")


def card_of(folder, tmp_path, name="me/again", **options) -> str:
    """What `publish` writes to the card, in a new folder."""
    tree = tmp_path / f"tree-{len(list(tmp_path.glob('tree-*')))}"
    publish(folder, name, dry_run=tree, **options)
    return (tree / "README.md").read_text()


def test_what_is_published_again_has_a_whole_card(place, tmp_path):
    """With the samples and the figures of before, under its new name, and what its author wrote about it."""
    options = dict(photos=[place / "photo.png"], evaluation=place / "evaluation.json")
    folder = Path(publish(place / "run", "me/first", dry_run=tmp_path / "first", **options))
    again = card_of(folder, tmp_path)
    assert again == (folder / "README.md").read_text().replace("me/first", "me/again").replace("first", "again", 2)
    assert again.count("## Use") == again.count("## Samples") == again.count("| colorization | PSNR | 21.5 |") == 1
    assert (tmp_path / "tree-0" / "samples.png").read_bytes() == (folder / "samples.png").read_bytes()
    for mark in ("<!-- palette:begin -->", "<!-- palette:end -->"):  # as cards were before
        again = again.replace(f"{mark}\n\n", "").replace(f"\n\n{mark}", "")
    own = '```python\npipe = PalettePipeline.from_pretrained("me/own")\n```\n'
    (folder / "README.md").write_text(f"{again}\n## Thanks\n\n{own}")
    second = card_of(folder, tmp_path)
    assert second.count("## Use") == second.count("## Measured") == second.count("## Samples") == 1
    assert "# again\n" in second and second.endswith(f"<!-- palette:end -->\n\n## Thanks\n\n{own}")
    (folder / "README.md").write_text(second.replace("## Use", "## Used"))
    assert card_of(folder, tmp_path) == second


def test_the_usage_of_a_runs_card_is_replaced(tmp_path, monkeypatch):
    monkeypatch.delitem(_TASKS, "deblurring", raising=False)  # of an example that another test ran
    pipe = small_pipe()
    pipe.register_to_config(tasks=["deblurring", "colorization"], default_task="deblurring")
    pipe.save_pretrained(tmp_path / "pipe")
    changes = TrainSettings(tasks="deblurring,colorization", data="photos")
    write_card(tmp_path / "pipe" / "README.md", changes, 4, 10)
    assert "Not built in: `deblurring`; register it first" in (tmp_path / "pipe" / "README.md").read_text()
    card = card_of(tmp_path / "pipe", tmp_path)
    assert card.count("Not built in: `deblurring`; register it first") == 1 and "PATH OR HUB ID" not in card
    here, there = re.findall(r"```python\n(.*?)```", card, re.S)
    assert 'task="deblurring"' in here and "# again\n" in card
    assert "trust_remote_code" in there and 'task="colorization"' in there, "the package's Task is not there"
    pipe.register_to_config(tasks=["deblurring"])
    pipe.save_pretrained(tmp_path / "pipe")
    assert "trust_remote_code" not in card_of(tmp_path / "pipe", tmp_path)

    class Deblurring(Task):
        pass

    monkeypatch.setitem(_TASKS, "deblurring", Deblurring())
    assert "Not built in: `deblurring` (class `Deblurring`); " in card_of(tmp_path / "pipe", tmp_path)


def test_the_licence_of_a_card(place, tmp_path):
    """Its own name and address are kept where it is another, and dropped where it is none; a LICENSE is told."""
    shutil.copytree(place / "run" / "pipeline", tmp_path / "pipe")
    card = tmp_path / "pipe" / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/mine\n---\n")
    kept = "license: other\nlicense_name: mine\nlicense_link: https://example.org/mine\n"
    assert kept in card_of(tmp_path / "pipe", tmp_path)
    (tmp_path / "pipe" / "LICENSE").write_text("Not for sale.")
    assert kept in card_of(tmp_path / "pipe", tmp_path)
    free = card_of(tmp_path / "pipe", tmp_path, license="apache-2.0")
    assert "license: apache-2.0\n" in free and "license_" not in free
    card.unlink()
    told = "license: other\nlicense_name: see-license-file\nlicense_link: LICENSE\n"
    assert told in card_of(tmp_path / "pipe", tmp_path)
    card.write_text("---\nlicense: mit\n---\n")
    assert "license: mit\n" in card_of(tmp_path / "pipe", tmp_path)


def test_code_that_one_file_cannot_hold():
    with pytest.raises(ValueError, match="tasks.py imports hints"):
        bundle(("masks", "tasks"), "0")


def test_code_of_one_file_runs(monkeypatch):
    """Each room after those that it needs already while it is read."""
    for name, rooms in FILES.items():
        module = ModuleType(Path(name).stem)
        module.__file__ = name
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look for theirs
        exec(compile(bundle(rooms, "0"), name, "exec"), module.__dict__)


def test_weights_beyond_float16_are_refused(tmp_path):
    pipe = small_pipe()
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0, 0, 0] = 1e6
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="beyond float16, conv_out.weight"):
        publish(tmp_path / "pipe", NAME, dry_run=tmp_path / "tree")


def test_saved_and_loaded_bit_for_bit(tmp_path, place):
    pipe = small_pipe()
    pipe.save_pretrained(tmp_path / "one")
    loaded = PalettePipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 4
    for name in files:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        if name.suffix == ".json":  # where it was loaded from is noted
            one, two = (json.loads(content) | {"_name_or_path": None} for content in (one, two))
        assert one == two, name
    assert json.loads((tmp_path / "one" / "model_index.json").read_text())["_format"] == 1


def test_a_licence_is_saved_again(online, place, tmp_path):
    """Of a folder and of a repository, also where the cache has none; a network of one's own has another."""
    shutil.copytree(place / "run" / "pipeline", tmp_path / "from")
    (tmp_path / "from" / "LICENSE").write_text("Not for sale.")
    files = {p.relative_to(tmp_path / "from").as_posix(): p for p in (tmp_path / "from").rglob("*") if p.is_file()}
    online.repos["me/licensed"] = Repo()
    online.repos["me/licensed"].commit({name: path.read_bytes() for name, path in files.items()})
    for number, name in enumerate((tmp_path / "from", "me/licensed")):
        pipe = PalettePipeline.from_pretrained(name, cache_dir=tmp_path / "cache")
        pipe.save_pretrained(tmp_path / f"{number}")
        assert (tmp_path / f"{number}" / "LICENSE").read_text() == "Not for sale."
    (tmp_path / "0" / "LICENSE").write_text("Mine.")
    pipe.save_pretrained(tmp_path / "0")
    assert (tmp_path / "0" / "LICENSE").read_text() == "Mine."
    card = card_of(tmp_path / "1", tmp_path)
    assert "license: other\n" in card and (tmp_path / "tree-0" / "LICENSE").read_text() == "Not for sale."
    PalettePipeline.from_pretrained(tmp_path / "from", unet=toy_unet()).save_pretrained(tmp_path / "own")
    next((tmp_path / "cache").rglob("LICENSE")).unlink()
    pipe = PalettePipeline.from_pretrained("me/licensed", cache_dir=tmp_path / "cache", local_files_only=True)
    pipe.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "own" / "LICENSE").exists() and not (tmp_path / "none" / "LICENSE").exists()


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    small_pipe().save_pretrained(tmp_path / "pipe")
    publish(tmp_path / "pipe", NAME, dry_run=tmp_path / "tree")
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in tmp_path.rglob("*") if p.is_file()} == {(tmp_path / "plain").stat().st_mode}


def test_format_1_stays_loadable():
    folder = Path(__file__).parent / "fixtures" / "format1"
    pipe = PalettePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    out = pipe(image, task="colorization", output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert pipe.config.default_steps == 3 and pipe.config.tasks == ["colorization", "jpeg_restoration"]
    np.testing.assert_allclose(out, np.load(folder / "output.npy"), atol=1e-5)


def test_adapters(tmp_path, place):
    """Low-rank adapters are added, saved, loaded, fused and unfused as PEFT users do, and published."""
    from peft import LoraConfig

    pipe = small_pipe()
    plain = sample(pipe, place / "photo.png")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name="mine")
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.5)
    adapted = sample(pipe, place / "photo.png")
    pipe.unet.save_lora_adapter(tmp_path / "pipe" / "lora", adapter_name="mine")
    pipe = small_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    tree = Path(publish(tmp_path / "pipe", NAME, dry_run=tmp_path / "tree"))

    pipe = PalettePipeline.from_pretrained(tree)
    pipe.unet.load_lora_adapter(tree / "lora", prefix=None, use_safetensors=True, adapter_name="mine")
    for p in pipe.unet.parameters():  # a mapped file's lie at other addresses, and some processors then round otherwise
        p.data = p.data.clone()
    assert sample(pipe, place / "photo.png") == adapted != plain
    attention = pipe.unet.mid_block.attentions[0].to_q.base_layer
    before = attention.weight.clone()
    pipe.unet.fuse_lora(adapter_names=["mine"])
    assert (attention.weight - before).abs().max() > 0.01
    pipe.unet.unfuse_lora()
    torch.testing.assert_close(attention.weight, before, atol=1e-5, rtol=0)
    assert "lora" in (tree / "README.md").read_text()


PEAK = """
import os, re, sys
from pathlib import Path
import torch
from palette_diffusers import PalettePipeline
torch.set_num_threads(1)  # a fork has none of the others
PalettePipeline.from_pretrained()  # what is imported on the way
kib = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for folder, dtype in (
    ("one", "none named"), ("one", "float32"), ("one", "bfloat16"), ("shards", "float32"), ("shards", "bfloat16"),
):
    if os.fork():  # each in a process of its own, where nothing was freed before
        os.wait()
        continue
    PalettePipeline.from_pretrained(dtype=torch.bfloat16)  # a fork counts the libraries' pages anew
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kib("VmRSS")
    pipe = PalettePipeline.from_pretrained(Path(sys.argv[1]) / folder, dtype=getattr(torch, dtype, None))
    weights = list(pipe.unet.parameters())
    assert all(weight.sum().isfinite() for weight in weights)  # reads every page, and holds no copy
    print(1024 * (kib("VmHWM") - before) / sum(weight.nbytes for weight in weights), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is counted anew by Linux's clear_refs alone")
def test_loading_peaks_little_above_the_weights(tmp_path):
    unet = toy_unet(block_out_channels=(64, 512), layers_per_block=8, norm_num_groups=32)
    pipe = PalettePipeline(unet, PaletteScheduler())
    pipe.save_pretrained(tmp_path / "one")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="200MB")
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 5 and all(0.9 < peak < 1.1 for peak in peaks), (peaks, done.stderr[-2000:])
