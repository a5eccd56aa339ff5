"""Whatever restores can be measured: a pipeline, a Python function, a folder of results, a command, a baseline.

A restorer maps a `Batch` to pictures (B, 3, S, S), RGB, [-1, 1].
"""

import copy
import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from .. import canvas
from ..machine import accelerator_lost
from ..tasks import get_task
from .features import load_function
from .inputs import Batch
from .store import fingerprint, weights_content


@dataclass(frozen=True)
class Restorer:
    """name: of its row. stochastic: whether another seed gives another picture. about: what it was, for the results.
    content: of a variant, the hash of what makes the pictures; another one's figures are made anew.
    check: called with the variant and all names before anything is computed. folder: of results that it reads.
    multiple: of which its pictures' sides must be."""

    name: str
    restore: Callable[[Batch], torch.Tensor]
    stochastic: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    check: Callable[[str, list[str]], None] = lambda variant, names: None
    handles: Callable[[str], bool] = lambda task: True
    content: Callable[[str], str] = lambda variant: ""
    folder: Path | None = None
    multiple: int = 1

    def __call__(self, batch: Batch) -> torch.Tensor:
        images = self.restore(batch)
        if not isinstance(images, torch.Tensor):
            raise ValueError(f"{self.name} gave a {type(images).__name__}, expected a tensor")
        if images.shape != batch.given.known.shape:
            raise ValueError(
                f"{self.name} gave {tuple(images.shape)} for {batch.names[0]} and on, "
                f"expected {tuple(batch.given.known.shape)}"
            )
        if not torch.isfinite(images).all():
            raise ValueError(f"{self.name} gave pixels that are not finite for {batch.names[0]} and on")
        return images


def folder_name(variant: str) -> str:
    """A variant as a folder's name: "inpainting:center" => "inpainting-center"."""
    return variant.replace(":", "-")


def from_pipeline(
    pipe: Any, name: str = "Palette", steps: int | None = None, about: dict | None = None, **changes: Any
) -> Restorer:
    """A `PalettePipeline`, at its working size; `changes` are set on the task (an experiment's `start`)."""
    pipe.set_progress_bar_config(disable=True)

    def restore(batch: Batch) -> torch.Tensor:
        task = copy.copy(get_task(batch.variant.partition(":")[0]))
        for key, value in changes.items():
            setattr(task, key, value)
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        sample = pipe.denoise(batch.given, generators, steps, task=task).cpu()
        return task.compose(sample, batch.given)

    def check(variant: str, names: list[str]) -> None:
        task = variant.partition(":")[0]
        if task not in pipe.config.tasks:
            raise ValueError(f"task is {task!r}, {name} knows {', '.join(pipe.config.tasks)}")

    facts = {
        "solver": type(pipe.scheduler).__name__,
        "steps": steps or pipe.config.default_steps,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    content = _content(pipe)
    if isinstance(pipe.unet, ModelMixin):  # an exported network has no weights to read
        facts["weights"] = weights_content(pipe.unet.state_dict())
    return Restorer(
        name, restore, True, {**facts, **(about or {}), **changes}, check,
        content=lambda variant: content, multiple=pipe.unet.size_multiple,
    )  # fmt: skip


def _content(pipe: Any) -> str:
    """Of a pipeline's weights and configurations, wherever it lies."""
    configs = [
        {key: value for key, value in part.config.items() if not key.startswith("_")}
        for part in (pipe, pipe.scheduler, pipe.unet)
    ]
    weights = getattr(pipe.unet, "file", None) or pipe.unet.state_dict()  # an exported network has no weights to read
    return fingerprint(json.dumps(configs, sort_keys=True, default=str), weights)


def _opencv(method: str) -> Callable[[Batch], torch.Tensor]:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{method} needs OpenCV: pip install 'palette-diffusers[eval]' ({error})") from None
    flag = {"Telea": cv2.INPAINT_TELEA, "Navier-Stokes": cv2.INPAINT_NS}[method]

    def restore(batch: Batch) -> torch.Tensor:
        out = []
        assert batch.given.mask is not None
        for image, hole in zip(batch.given.known.split(1), batch.given.mask, strict=True):
            filled = cv2.inpaint(canvas.to_uint8(image), hole[0].byte().numpy().copy() * 255, 3, flag)
            out.append(torch.from_numpy(filled).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(out)

    return restore


def _masks_only(task: str) -> bool:
    return bool(get_task(task).takes_mask)


def baseline(name: str) -> Restorer:
    """`identity` (of a super-resolution task, whose sources are bicubic, that is bicubic), or OpenCV's `telea` and
    `navier-stokes`, which fill holes.

    Raises:
        ValueError: no such baseline. ImportError: OpenCV is missing.
    """
    if name == "identity":
        return Restorer("degraded", lambda batch: batch.given.known)
    if name in ("telea", "navier-stokes"):
        method = {"telea": "Telea", "navier-stokes": "Navier-Stokes"}[name]
        return Restorer(method, _opencv(method), handles=_masks_only)
    raise ValueError(f"baseline is {name!r}, expected {', '.join(BASELINES)}")


BASELINES = ("identity", "telea", "navier-stokes")


def write_pictures(folder: Path, names: list[str], images: torch.Tensor) -> None:
    """NAME.png of each (B, 3, H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images.split(1), strict=True):
        canvas.save(canvas.to_pil(image), folder / f"{name}.png")


def read_pictures(folder: Path, names: list[str], size: tuple[int, int]) -> torch.Tensor:
    """NAME.png of a folder: (B, 3, *size).

    Raises:
        FileNotFoundError: one is missing. ValueError: one has another size.
    """
    out = []
    for name in names:
        picture = canvas.read(folder / f"{name}.png")
        if picture.size != size:
            raise ValueError(
                f"{folder / name}.png is {picture.size[1]}x{picture.size[0]}, the original {size[1]}x{size[0]}"
            )
        out.append(picture.image)
    return torch.cat(out)


def check_names(folder: Path, names: list[str]) -> None:
    """Whether a folder holds NAME.png for every name, and no other picture.

    Raises:
        ValueError: how many are missing or too many, with the first of them.
    """
    wanted = {f"{name}.png" for name in names}
    there = {path.name for path in folder.glob("*") if path.suffix.lower() in canvas.SUFFIXES}
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    if missing or extra:
        lacks = f"lacks {len(missing)} of {len(names)} pictures ({missing[0]})" if missing else ""
        more = f"has {len(extra)} that no input belongs to ({extra[0]})" if extra else ""
        raise ValueError(f"{folder} {' and '.join(filter(None, (lacks, more)))}")


def from_folder(folder: Path, name: str) -> Restorer:
    """Results as files NAME.png, named as in the manifest, in `folder` or in its folder of the variant."""

    def of(variant: str) -> Path:
        inner = folder / folder_name(variant)
        return inner if inner.is_dir() else folder

    def restore(batch: Batch) -> torch.Tensor:
        size = batch.given.known.shape[-2:]
        return read_pictures(of(batch.variant), batch.names, (size[0], size[1]))

    def content(variant: str) -> str:
        files = sorted(of(variant).glob("*.png"))
        return fingerprint(json.dumps([file.name for file in files]), *files)

    def check(variant: str, names: list[str]) -> None:
        check_names(of(variant), names)

    return Restorer(name, restore, content=content, check=check, folder=folder)


def from_command(command: str, name: str) -> Restorer:
    """A command that reads NAME.png from the folder {inputs} (and {masks}, white = generate) and writes NAME.png
    into {outputs}; it is run once a batch. It is taken for another one when a file that it names has changed.
    """
    words = shlex.split(command)
    place = re.compile(r"(?<!\$){(inputs|masks|outputs)}")  # but not a shell's ${inputs}

    def restore(batch: Batch) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            places = {n: Path(folder) / n for n in ("inputs", "masks", "outputs")}
            outputs = places["outputs"]
            write_pictures(places["inputs"], batch.names, batch.given.known)
            if batch.given.mask is not None:
                write_pictures(places["masks"], batch.names, batch.given.mask.expand(-1, 3, -1, -1) * 2 - 1)
            outputs.mkdir()
            filled = [place.sub(lambda found: str(places[found[1]]), word) for word in words]
            done = subprocess.run(filled, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                raise ValueError(f"{filled[0]} ended with code {done.returncode} on {batch.names[0]} and on: {last}")
            check_names(outputs, batch.names)
            size = batch.given.known.shape[-2:]
            return read_pictures(outputs, batch.names, (size[0], size[1]))

    files = [Path(word) for word in words if Path(word).is_file()]
    told = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
    return Restorer(name, restore, about={"command": told}, content=lambda variant: fingerprint(told, *files))


def from_function(restore: Callable[..., torch.Tensor], name: str, content: str = "") -> Restorer:
    """A function (known (B, 3, S, S), mask (B, 1, S, S) or None) => pictures (B, 3, S, S). content: its hash.

    Whatever it raises becomes a ValueError that names the pictures, unless the accelerator is lost.
    """

    def guarded(batch: Batch) -> torch.Tensor:
        try:
            return restore(batch.given.known, batch.given.mask)
        except Exception as error:  # another's code: it can be anything
            if accelerator_lost(error):
                raise
            last = f" to {batch.names[-1]}" if len(batch.names) > 1 else ""
            raise ValueError(f"{name} failed on {batch.names[0]}{last}: {type(error).__name__}: {error}") from error

    return Restorer(name, guarded, content=lambda variant: content)


def load_restorer(spec: str, load_pipeline: Callable[[str | None], Any], steps: int | None = None) -> Restorer:
    """A restorer by its name: `starter`, a baseline, `FILE.py:FUNCTION`, a command with {inputs} and {outputs}, a
    folder of results or of a pipeline, or a Hub id. "NAME=SPEC" names its row.

    Raises:
        ValueError, OSError: no such restorer.
    """
    name, equals, rest = spec.partition("=")
    if equals and re.fullmatch(r"[\w -]+", name):
        return replace(load_restorer(rest, load_pipeline, steps), name=name)
    if spec in BASELINES:
        return baseline(spec)
    if "{outputs}" in spec:
        return from_command(spec, Path(shlex.split(spec)[0]).name)
    path, _, function = spec.rpartition(":")
    if path.endswith(".py"):
        return from_function(load_function(path, function), function, fingerprint(Path(path), function))
    folder = Path(spec)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        if (folder / "pipeline" / "model_index.json").is_file():
            raise FileNotFoundError(f"{spec} is a training run's folder: name its {folder / 'pipeline'}")
        if not any(folder.rglob("*.png")):
            others = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in canvas.SUFFIXES)
            but = f", but {len(others)} other pictures ({others[0]})" if others else ""
            raise FileNotFoundError(f"{spec} holds neither a model_index.json nor results NAME.png{but}")
        return from_folder(folder, folder.name)
    return from_pipeline(load_pipeline(spec), steps=steps, about={"model": folder.name})
