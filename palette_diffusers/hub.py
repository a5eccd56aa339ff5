"""A pipeline's folder => a repository of the Hub that loads with this package and without it."""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from . import __version__, canvas
from .bundle import COMPONENTS, FILES, bundle
from .checkpoint import even_modes, is_local
from .evaluation.store import weights_content
from .files import new_folder, occupied
from .pipeline import SHIPPED, STARTER, PalettePipeline
from .report import built_in, call, draw_samples, usage
from .sizes import resize
from .tasks import Given, get_task, task_names

SUMS = "SHA256SUMS"
SHEET = "samples.png"
SHARD = "1GB"
SAMPLED = ("steps", "solver", "dtype")  # of an evaluation's row, told on the card
BEGIN, END = "<!-- palette:begin -->", "<!-- palette:end -->"  # of what a publication writes into a card
ADAPTERS = (
    "`lora/` holds the low-rank adapters on their own, for the model that they were tuned on: "
    "`pipe.unet.load_lora_adapter(FOLDER, prefix=None, use_safetensors=True)`."
)
# what the next publication writes anew: what is between the marks, the sections of cards without any, a run's usage
GENERATED = re.compile(
    rf"{BEGIN}.*?{END}"
    r"|## Use\n+(?:```python\n[^`]*```\n+)?"
    r"Without that package, diffusers runs the Python files of this repository instead; read them first:\n+"
    r"(?:```python\n[^`]*```\n+)?"
    r"`variant=\"fp16\"` downloads the weights in half precision\."
    rf"(?:\n+{re.escape(ADAPTERS)})?"
    rf"(?:\n+## Samples\n+!\[[^\n]*\]\({re.escape(SHEET)}\))?"
    r"(?:\n+## Measured\n+(?:\d+ images a task[^\n]*\n+)?(?:\|[^\n]*\|(?:\n|\Z))+)?"
    r"|(?:Not built in: [^\n]*\n+)?```python\n[^`]*\"PATH OR HUB ID\"[^`]*```",
    re.S,
)


def publish(
    source: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    create_pr: bool = False,
    dry_run: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] = (),
    base_model: str | None = None,
    evaluation: str | os.PathLike | None = None,
    photos: str | os.PathLike | Sequence[str | os.PathLike] = (),
    sheet: bool = False,
    max_shard_size: str = SHARD,
    overwrite_card: bool = False,
    token: str | None = None,
) -> str:
    """Uploads a pipeline in one commit: weights in float32 and float16, configuration, card, samples, checksums and
    the code that `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` needs. Nothing else of the
    folder is uploaded. Files of an earlier publication that this one lacks are removed.

    Args:
        source: a pipeline's folder, a training run's, or "starter".
        repo_id: USER/NAME; created if it doesn't exist.
        private: for a repository that is created. create_pr: propose the commit instead of making it.
        dry_run: write the repository's files to this new folder, and upload nothing.
        license: as the Hub names it, "other" for instance; datasets, base_model: Hub ids. Without them, what the
            folder's own card says; a LICENSE in the folder is "other".
        evaluation: results.json of `palette evaluate`, or JSON with `results`, task => "Palette" => metric =>
            number; becomes the card's table and its model-index. Of the former, the rows of these weights are taken.
        photos: pictures that samples are made of. sheet: instead of these, the run's newest sheet of samples, which
            shows photographs of its data. Without either, the samples of a folder that was published before.
        max_shard_size: weights are split into files of at most this size.
        overwrite_card: also where the card was edited on the Hub.
        token: the login's, if None.

    Returns:
        The URL of the repository or the pull request; the folder of a dry run.

    Raises:
        FileNotFoundError: no pipeline there, or no sheet. ValueError: a card that was edited on the Hub, a public
            repository where a private one was asked for, weights beyond float16, a dry run's folder that isn't
            empty, a licence "other" without a LICENSE, no USER/NAME,
            a sheet and photos.
    """
    check_name(repo_id)
    datasets = [datasets] if isinstance(datasets, str) else datasets
    photos = [photos] if isinstance(photos, str | os.PathLike) else photos
    if sheet and photos:
        raise ValueError("sheet and photos: a card has the one or the other as its samples")
    folder, run = find_pipeline(source)
    if dry_run is not None and occupied(Path(dry_run)):
        raise ValueError(f"{dry_run} is not empty: name a new folder")
    with tempfile.TemporaryDirectory() if dry_run is None else new_folder(Path(dry_run)) as place:
        tree = Path(place)
        pipe = PalettePipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        write_weights(pipe, tree, max_shard_size)
        write_code(tree)
        _copy_extras(folder, run, tree)
        if sheet:
            shutil.copyfile(_newest_sheet(run), tree / SHEET)
        elif photos:
            steps, number = pipe.config.default_steps, len(photos)
            draw_samples(pipe.unet, pipe.scheduler, _Photos(pipe, photos), steps, tree / SHEET, number)
        elif _shows_samples(folder):
            shutil.copyfile(folder / SHEET, tree / SHEET)
        results = read_evaluation(evaluation, _weights(pipe)) if evaluation else {}
        card = make_card(pipe, repo_id, folder, run, results, (tree / SHEET).is_file(), license, datasets, base_model)
        card.save(tree / "README.md")
        write_sums(tree)
        if dry_run is None:
            return upload(tree, repo_id, private, create_pr, overwrite_card, token)
    return str(dry_run)


def check_name(repo_id: str) -> None:
    """Raises:
    ValueError: no name as the Hub takes it, or one without a user.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no name of a repository: expected USER/NAME")


def find_pipeline(source: str | os.PathLike) -> tuple[Path, Path | None]:
    """A pipeline's folder, or a training run's => the pipeline's folder, and the run's if there is one."""
    folder = SHIPPED.get(str(source), Path(source))
    if (folder / "model_index.json").is_file():
        run = folder.parent if (folder.parent / "settings.json").is_file() else None
        return folder, run
    if (folder / "pipeline" / "model_index.json").is_file():
        return folder / "pipeline", folder
    raise FileNotFoundError(f"{folder} holds no pipeline, neither model_index.json nor pipeline/model_index.json")


# the files


def write_weights(pipe: PalettePipeline, tree: Path, max_shard_size: str = SHARD) -> None:
    """`save_pretrained` in float32 and as the variant fp16; the index names the code that goes with it."""
    pipe.save_pretrained(tree, max_shard_size=max_shard_size)
    half = copy.deepcopy(pipe.unet).half()
    bad = [name for name, value in half.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{len(bad)} weights are beyond float16, {bad[0]} for one")
    half.save_pretrained(tree / "unet", variant="fp16", max_shard_size=max_shard_size)
    even_modes(tree)
    for path in tree.rglob("*.json"):
        content = json.loads(path.read_text())
        if content.pop("_name_or_path", None):  # a path of this machine
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    path = tree / "model_index.json"
    index = json.loads(path.read_text())
    index["tasks"] = ",".join(index["tasks"])  # diffusers takes every list for a component
    if index["student"] and index["student"] not in SHIPPED and is_local(index["student"]):  # nobody else has it
        index["student"] = None
    for name, value in index.items():
        if name == "_class_name":
            index[name] = [COMPONENTS[value], value]
        elif isinstance(value, list) and len(value) == 2 and value[1] in COMPONENTS:
            index[name] = [COMPONENTS[value[1]], value[1]]
    path.write_text(json.dumps(index, indent=2) + "\n")


def write_code(tree: Path) -> None:
    """The files that the index names: a scheduler of diffusers' own needs none."""
    index = (tree / "model_index.json").read_text()
    for name, rooms in FILES.items():
        if f'"{Path(name).stem}"' in index:
            (tree / name).write_text(bundle(rooms, __version__), encoding="utf-8")


def _copy_extras(folder: Path, run: Path | None, tree: Path) -> None:
    """The licence and low-rank adapters."""
    licence = folder / "LICENSE"
    if not licence.is_file() and _from_starter(run):
        licence = STARTER / "LICENSE"
    for path, name in (
        (licence, "LICENSE"),
        (folder / "lora" / "pytorch_lora_weights.safetensors", "lora/pytorch_lora_weights.safetensors"),
    ):
        if path.is_file():
            (tree / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, tree / name)


def _newest_sheet(run: Path | None) -> Path:
    sheets = sorted((run / "samples").glob("step-*.png")) if run else []
    if not sheets:
        raise FileNotFoundError("there is no sheet of samples: a training run's folder was expected, that drew one")
    return sheets[-1]


def _shows_samples(folder: Path) -> bool:
    """Whether this is a published folder, with samples on its card."""
    card = folder / "README.md"
    return (folder / SHEET).is_file() and card.is_file() and f"]({SHEET})" in card.read_text(encoding="utf-8")


def _from_starter(run: Path | None) -> bool:
    return run is not None and json.loads((run / "settings.json").read_text()).get("init") in SHIPPED


class _Photos:
    """Photographs, in place of a data set's fixed samples."""

    def __init__(self, pipe: PalettePipeline, photos: Sequence[str | os.PathLike]):
        self.tasks = [name for name in pipe.config.tasks if name in task_names() and name != "paired"]
        if not self.tasks:
            raise ValueError(f"samples can't be made of photos: {', '.join(pipe.config.tasks)} makes no sources")
        side = pipe.unet.config.sample_size
        self.pictures = [resize(_square(canvas.read(path).image), (side, side)).clamp(-1, 1) for path in photos]

    def fixed(self, task: str, number: int) -> list[tuple[torch.Tensor, Given]]:
        return [
            (picture, get_task(task).degrade(picture, torch.Generator().manual_seed(k)))
            for k, picture in enumerate(self.pictures[:number])
        ]


def _square(image: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def write_sums(tree: Path) -> None:
    """`SHA256SUMS` of all files; `sha256sum -c SHA256SUMS` checks it."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    lines = [f"{sha256(path.read_bytes())}  {path.relative_to(tree).as_posix()}\n" for path in files]
    (tree / SUMS).write_text("".join(lines))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# the card


def _weights(pipe: PalettePipeline) -> set[str]:
    """The hashes that an evaluation of these weights may have noted: it read them in this precision, or in half."""
    half = {name: value.half() for name, value in pipe.unet.state_dict().items()}
    return {weights_content(pipe.unet.state_dict()), weights_content(half)}


def read_evaluation(path: str | os.PathLike, weights: Collection[str] = ()) -> dict[str, Any]:
    """An evaluation's JSON => `results`, task => "Palette" => metric => number, beside `count` and `dataset`.

    It may be what `palette evaluate` wrote (results.json), of which the rows of these `weights` are taken (hashes,
    `evaluation.store.weights_content`), or already of this form.

    Raises:
        ValueError: no JSON with such results, or it is of other weights.
    """
    try:
        report = json.loads(Path(path).read_text())
        if "rows" in report:
            rows = [row for row in report["rows"] if "weights" in row.get("about", {})]
            own = [row for row in rows if row["about"]["weights"] in weights]
            if weights and rows and not own:
                others = ", ".join(dict.fromkeys(row["images"] for row in rows))
                raise ValueError(f"{path} holds figures of other weights ({others}), none of this pipeline's")
            report = _of_rows(report, own)
        ours = _ours(report)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError):
        ours = []
    if not ours:
        raise ValueError(f'{path} is no evaluation: expected JSON with results, task => "Palette" => metric => number')
    return report


def _of_rows(table: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, Any]:
    """By task and row; the first of one's `own` of each task is "Palette", and how it was sampled is told."""
    results: dict[str, dict] = {}
    for row in table["rows"]:
        if not own or row["images"] != "Palette":  # which may be another model's
            results.setdefault(row["task"], {})[row["images"]] = _figures(table, row)
    how = {}
    for row in reversed(own):
        results.setdefault(row["task"], {})["Palette"] = _figures(table, row)
        how[row["task"]] = ", ".join(f"{name} {row['about'][name]}" for name in SAMPLED if name in row["about"])
    told = "; ".join(dict.fromkeys(how.values()))
    return {"count": table["settings"]["count"], "dataset": table["settings"]["data"], "results": results, "how": told}


def _figures(table: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    return {name: round(row[key]["value"], 4) for key, name in table["figures"].items() if key in row}


def make_card(
    pipe: PalettePipeline,
    repo_id: str,
    folder: Path,
    run: Path | None,
    evaluation: dict[str, Any],
    samples: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
) -> ModelCard:
    """The card: what the folder's own card says and, between marks that the next publication finds, how to use the
    model, samples, and what was measured."""
    old = ModelCard.load(folder / "README.md") if (folder / "README.md").is_file() else None
    data = old.data if old else ModelCardData()
    data.library_name, data.pipeline_tag = "diffusers", "image-to-image"
    data.tags = list(dict.fromkeys(["palette", *(data.tags or []), *pipe.config.tasks]))
    licensed = _from_starter(run) or (folder / "LICENSE").is_file()
    data.license = license or data.license or ("other" if licensed else None)
    if data.license != "other":
        data.license_name = data.license_link = None
    else:
        data.license_name = data.license_name or "see-license-file"
        if not str(data.license_link).startswith(("https://", "http://")):
            if not licensed:
                raise ValueError(f"license is 'other', but {folder} has no LICENSE to say which")
            data.license_link = "LICENSE"
    data.datasets = list(datasets) or data.datasets
    data.base_model = base_model or data.base_model
    name, text = repo_id.split("/")[-1], (old.text.strip() if old else "") or _about(pipe)
    earlier = "\n\n".join(GENERATED.findall(text))
    table = measured(evaluation) or _section("Measured", earlier)
    if evaluation:
        data.eval_results = _eval_results(evaluation)
    if data.eval_results:
        data.model_name = name
    written, *more = (part.strip() for part in GENERATED.split(text))
    titles = ["Palette model", *re.findall(r'PalettePipeline\.from_pretrained\("[^"\n]*/([^"\n]+)"\)', earlier)]
    written = re.sub(rf"^# (?:{'|'.join(map(re.escape, titles))})$", f"# {name}", written, count=1, flags=re.M)
    if table:
        written = written.replace("Its quality has not been measured here.", "").strip()
    parts = [_usage(pipe, repo_id, (folder / "lora").is_dir())]
    if samples and not any(f"]({SHEET})" in part for part in (written, *more)):
        parts.append(f"## Samples\n\n![Rows by task: source, sample, original]({SHEET})")
    if table:
        parts.append(f"## Measured\n\n{table}")
    text = "\n\n".join(filter(None, [written, BEGIN, *parts, END, *more]))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _about(pipe: PalettePipeline) -> str:
    """What the configuration says of a model whose folder says nothing."""
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    return (
        f"# Palette model\n\nA [Palette](https://arxiv.org/abs/2111.05826) image-to-image diffusion model: "
        f"{', '.join(pipe.config.tasks)}. {pipe.unet.config.sample_size} pixels, {parameters / 1e6:.1f}M parameters, "
        f"{pipe.config.default_steps} steps."
    )


def _section(title: str, generated: str) -> str:
    """Of what earlier publications wrote into a card, the section of this title; empty where there is none."""
    found = re.search(rf"^## {title}\n+(.*?)\s*(?=^## |{END}|\Z)", generated, re.M | re.S)
    return found[1] if found else ""


def _usage(pipe: PalettePipeline, repo_id: str, adapters: bool) -> str:
    tasks, task = pipe.config.tasks, pipe.config.default_task
    parts = [f"## Use\n\n{usage(repo_id, tasks, task)}"]
    if alone := [name for name in (task, *tasks) if built_in(name)]:
        parts.append(
            f"""Without that package, diffusers runs the Python files of this repository instead; read them first:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
{call(alone[0])}
```"""
        )
    parts.append('`variant="fp16"` downloads the weights in half precision.')
    return "\n\n".join([*parts, ADAPTERS] if adapters else parts)


def _ours(evaluation: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) of this model, where it is a finite number."""
    return [
        (task, metric, value)
        for task, methods in evaluation.get("results", {}).items()
        for metric, value in methods.get("Palette", {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def measured(evaluation: dict[str, Any]) -> str:
    """A Markdown table of an evaluation, empty where there is none."""
    rows = [f"| {task} | {metric} | {value:g} |" for task, metric, value in _ours(evaluation)]
    how = f" ({evaluation['how']})" if evaluation.get("how") else ""
    count = f"{evaluation['count']} images a task{how}.\n\n" if "count" in evaluation else ""
    return count + "\n".join(["| task | metric | value |", "| --- | --- | --- |", *rows]) if rows else ""


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    dataset = str(evaluation.get("dataset", "unnamed"))
    return [
        EvalResult(
            task_type="image-to-image",
            task_name=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=task,  # the Hub groups by it, and not by the task's name
            metric_type=metric.lower().replace(" ", "-"),
            metric_name=metric,
            metric_value=value,
        )
        for task, metric, value in _ours(evaluation)
    ]


# the upload


class EditedCard(ValueError):
    """The card on the Hub is not the one that was published there."""


def upload(
    tree: Path, repo_id: str, private: bool = False, create_pr: bool = False, overwrite_card: bool = False,
    token: str | None = None, space: bool = False,
) -> str:  # fmt: skip
    """One commit of all files of a tree, by `huggingface_hub`, which retries and skips what is there already: to a
    model's repository, or a Space's."""
    api = HfApi(token=token, library_name="palette-diffusers", library_version=__version__)
    kind, sdk = ("space", "gradio") if space else ("model", None)
    try:
        api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"{repo_id} may not be written ({error.response.status_code}): log in (hf auth login) or give another token"
        ) from error
    info = api.space_info(repo_id) if space else api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and is public, a private one was asked for")
    there = {sibling.rfilename for sibling in info.siblings or []}
    before = _published(api, repo_id, kind, info.sha, there, overwrite_card)
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    names = [path.relative_to(tree).as_posix() for path in files]
    own = {name for name in there if name in before or (space and name.startswith(f"{__package__}/"))}
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)]
    operations += [CommitOperationDelete(name) for name in sorted(own - set(names))]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Palette {'demo' if space else 'pipeline'}, by palette-diffusers {__version__}",
        repo_type=kind,
        create_pr=create_pr,
        parent_commit=info.sha,
    )
    return commit.pr_url or f"{constants.ENDPOINT}/{'spaces/' if space else ''}{repo_id}"


def check_card(repo_id: str) -> None:
    """Raises:
    EditedCard: a model's card that was edited on the Hub.
    """
    api = HfApi()
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return
    _published(api, repo_id, "model", info.sha, {sibling.rfilename for sibling in info.siblings or []}, False)


def _published(
    api: HfApi, repo_id: str, kind: str, revision: str | None, there: set[str], overwrite_card: bool
) -> dict[str, str]:
    """The checksums of what was published before, none if nothing was.

    Raises:
        EditedCard: the card isn't what was published, and may not be overwritten.
    """
    before = _read_sums(_remote(api, repo_id, kind, revision, SUMS)) if SUMS in there else {}
    fresh = kind == "space" and there <= {".gitattributes", "README.md"}  # which the Hub gives a card
    if "README.md" in there and not overwrite_card and not fresh:
        if sha256(_remote(api, repo_id, kind, revision, "README.md")) != before.get("README.md"):
            raise EditedCard(f"the card of {repo_id} was edited on the Hub: it is kept unless overwrite_card is given")
    return before


def _remote(api: HfApi, repo_id: str, kind: str, revision: str | None, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, name, repo_type=kind, revision=revision, cache_dir=cache)
        return Path(path).read_bytes()


def _read_sums(content: bytes) -> dict[str, str]:
    lines = [line.split("  ", 1) for line in content.decode().splitlines() if "  " in line]
    return {name: digest for digest, name in lines}
