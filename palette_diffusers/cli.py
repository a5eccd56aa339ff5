"""The `palette` command. Thin: everything it does, the pipeline does. Heavy imports stay inside the commands."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Mend photographs with a Palette diffusion model.", no_args_is_help=True, pretty_exceptions_enable=False
)

Source = Annotated[Path, typer.Argument(help="the photograph, or a folder of them")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="file, of a folder a folder; default: IN-TASK.png beside IN")
]
Steps = Annotated[int | None, typer.Option(max=10_000, help="network evaluations; default: the checkpoint's")]
Texture = Annotated[bool | None, typer.Option(
    help="fills get the texture of their surroundings, where these have one; default: yes")]  # fmt: skip
Speed = Annotated[str | None, typer.Option(
    help="fast (the model's student, if it has one), balanced or best; default: its own")]  # fmt: skip
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="the same seed makes the same picture")]
Samples = Annotated[int, typer.Option(min=1, max=64, help="variations to write (OUT-1, OUT-2, ..., and OUT-sheet)")]
Model = Annotated[str | None, typer.Option(help="folder, Hub id, starter-few-steps or starter (the default)")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Limit = Annotated[float, typer.Option(help="larger files are refused before they are decoded")]
Recursive = Annotated[bool, typer.Option("--recursive", help="folders within the folder, too")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="make results of a folder anew that are there")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="only say what it will take: evaluations, time, memory")]
NoExif = Annotated[bool, typer.Option("--no-exif", help="drop date, place and camera; the colour profile stays")]


MILD = 50  # above this quality of a JPEG, what troubles the eye is likely of an earlier file
LOST = "the accelerator failed or is gone; what was finished is there, and the same command goes on from it"


def _fail(message: object) -> None:
    """One clear line, exit code 2."""
    print(f"palette: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(2)


def _needs(*packages: str, install: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        _fail(f"{' and '.join(missing)} missing: pip install {install}")


@contextmanager
def _one_line(*more: type[Exception]) -> Iterator[None]:
    """What was refused, as one line."""
    refused: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, MemoryError, FloatingPointError, *more)
    try:
        yield
    except refused as error:
        _fail(error)
    except RuntimeError as error:
        from .machine import accelerator_lost

        if not accelerator_lost(error):
            raise
        _fail(f"{LOST}: {str(error).partition(chr(10))[0]}")


def _load(model: str | None, device: str, dtype: str, speed: str | None = None) -> Any:
    import diffusers
    import torch

    from .machine import best_dtype, bound_caches, chosen_device
    from .norms import lay_out
    from .pipeline import PalettePipeline
    from .portable import is_portable, load_portable
    from .speed import check

    if speed is not None:
        check(speed)
    bound_caches()
    diffusers.utils.logging.disable_progress_bar()  # of loading two parts; a download has its own
    device = chosen_device(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in ("auto", *known):
        raise ValueError(f"dtype is {dtype!r}, expected auto, {', '.join(known)}")
    if is_portable(model):
        pipe, device = load_portable(model), "cpu"  # type: ignore[arg-type]
    else:
        pipe = PalettePipeline.from_pretrained(model, dtype=best_dtype(device) if dtype == "auto" else known[dtype])
        lay_out(pipe.to(device).unet, device)
    if speed is not None:
        pipe.speed(speed)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


@dataclass(frozen=True)
class _Work:
    """What a command was asked for."""

    task: str
    source: Path
    output: Path | None
    steps: int | None
    seed: int
    samples: int
    speed: str | None
    model: str | None
    device: str
    dtype: str
    max_megapixels: float
    recursive: bool
    overwrite: bool
    no_exif: bool
    plan: bool
    options: dict[str, Any]

    @property
    def limit(self) -> int:
        if not 0 < self.max_megapixels < 1e6:
            raise ValueError(f"max-megapixels is {self.max_megapixels:g}, expected above 0 and below 1000000")
        return round(self.max_megapixels * 1e6)

    def recipe(self, source: Path, mask: Path | str | None = None) -> dict[str, Any]:
        from . import recipes

        entry = recipes.fingerprint(Path(mask)) if mask is not None and Path(mask).is_file() else mask
        options = {k: recipes.fingerprint(Path(v)) if k == "hints" else v for k, v in self.options.items()}
        files = {"source": recipes.fingerprint(source), "mask": entry, "options": options}
        return self.settings() | files | {"sample": 0, "samples": self.samples}

    def settings(self) -> dict[str, Any]:
        """What a recipe says of a picture whatever its files."""
        return {
            "task": self.task, "model": self.model, "dtype": self.dtype, "steps": self.steps, "seed": self.seed,
            "speed": self.speed, "options": self.options, "no_exif": self.no_exif,
        }  # fmt: skip

    def finish(self, image: Any, recipe: dict[str, Any]) -> Any:
        from .canvas import RECIPE

        image.info[RECIPE] = json.dumps(recipe)
        if self.no_exif:
            for kept in ("exif", "xmp"):
                image.info.pop(kept, None)
        return image


def _quiet() -> None:
    import logging
    import warnings

    from .canvas import LossWarning

    warnings.filterwarnings("ignore")
    warnings.simplefilter("always", LossWarning)
    warnings.showwarning = lambda message, *_: print(f"palette: {message}", file=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _run(mask: str | None = None, options: dict[str, Any] | None = None, **asked: Any) -> None:
    work = _Work(**asked, options=options or {})
    _quiet()
    with _one_line():
        if mask is not None and not Path(mask).exists():
            from .canvas import plain_word

            mask = plain_word(mask)  # as a recipe keeps it
        if work.source.is_dir():
            _folder(work, mask)
        else:
            _file(work, mask)


def _jpeg(picture: Any, consistent: bool | None) -> str:
    """What JPEG a picture was, and whether it was another one before."""
    from .coefficients import find_coefficients

    quality, coefficients = picture.quality, find_coefficients(picture)
    earlier = None if coefficients is None or coefficients.earlier == quality else coefficients.earlier
    if earlier is None:
        found = "no JPEG" if quality is None else f"a JPEG of quality {quality}"
    elif quality is None:
        found = f"shows a JPEG of quality {earlier}"
    else:
        found = f"a JPEG of quality {quality}, made of one of quality {earlier}"
    shown = quality if earlier is None else earlier
    if shown is not None and shown > MILD and consistent is None:
        found += "; if it was resized after it had been a worse one, --no-consistent mends that, too"
    return found


def _file(work: _Work, mask: str | None) -> None:
    from . import canvas

    name = f"{work.source.stem}-{work.task}.png"
    target = work.output or work.source.with_name(name)
    target = target / name if target.is_dir() else target
    names = [str(i + 1) for i in range(work.samples)] + ["sheet"]
    targets = [target] if work.samples == 1 else [target.with_stem(f"{target.stem}-{name}") for name in names]
    canvas.kind_of(target)
    _spare(targets, work.source, mask, work.options.get("hints"))
    if work.output is None or work.output.is_dir():
        _spare_others(targets, work.source)
    picture = canvas.read(work.source, work.limit)  # before the model is loaded: bad input answers at once
    hole = None
    if mask is not None:
        picture, hole = canvas.with_mask(picture, mask)
        hole = hole.bool()  # a quarter of the memory
    if work.task == "jpeg_restoration":
        found = _jpeg(picture, work.options.get("consistent"))
        print(f"{work.source}: {found}", file=sys.stderr)
    if work.plan:
        _say_plan(work, work.source, picture, hole)
        return
    images, about = _sample(work, picture, hole)
    recipe = work.recipe(work.source, mask) | about
    for i, (image, path) in enumerate(zip(images, targets, strict=False)):
        canvas.save(work.finish(image, recipe | {"sample": i}), path)
        print(path)
    if work.samples > 1:
        sheet = canvas.sheet(images)
        sheet.info.update({k: v for k, v in images[0].info.items() if k == "icc_profile"})
        canvas.save(canvas.with_profile(sheet), targets[-1])
        print(targets[-1])
        print(f"diversity: {canvas.diversity(images):.1f} levels of 255 between two samples on average")


def _spare(targets: list[Path], *inputs: Path | str | None) -> None:
    """Raises:
    ValueError: a result would be written over what it is made from.
    """
    files = [Path(given) for given in inputs if given is not None and Path(given).is_file()]
    for target in targets:
        if target.exists() and any(target.samefile(file) for file in files):
            raise ValueError(f"{target} is an input: name another output")


def _spare_others(targets: list[Path], source: Path) -> None:
    """Raises:
    ValueError: a result of another photograph has the name that nobody chose: those of a.jpg and a.png are the same.
    """
    from . import recipes

    for target in targets:
        try:
            name = recipes.read(target)["source"]["name"]
        except (OSError, ValueError):
            continue
        if name != source.name:
            raise ValueError(f"{target} is the result of {name}: name another file for that of {source.name} by -o")


def _say_plan(work: _Work, source: Path, picture: Any, mask: Any) -> None:
    from .plan import plan

    pipe = _load(work.model, work.device, work.dtype, work.speed)
    pipe.set_progress_bar_config(disable=True)
    height, width = picture.size
    print(f"{source}: {width}x{height}, {work.task}")
    print(plan(
        pipe, picture, task=work.task, num_inference_steps=work.steps, num_images_per_input=work.samples,
        max_pixels=work.limit, **_masked(mask), **work.options,
    ))  # fmt: skip


def _sample(work: _Work, picture: Any, mask: Any, recipe: dict[str, Any] | None = None) -> tuple[list, dict[str, Any]]:
    """The pictures, and what a recipe says of the network.

    Raises:
        ValueError: its weights are not those of the `recipe` that is followed.
    """
    import torch

    from . import recipes

    pipe = _load(work.model, work.device, work.dtype, work.speed)
    about = _about(pipe)
    if recipe is not None and recipes.other_weights(about, recipe):
        model = work.model or "starter"
        raise ValueError(f"{model} has other weights than the picture was made by: name that model by --model")
    images = pipe(
        picture, task=work.task, num_inference_steps=work.steps, num_images_per_input=work.samples,
        generator=torch.Generator().manual_seed(work.seed), max_pixels=work.limit, **_masked(mask), **work.options,
    ).images  # fmt: skip
    return images, about


def _about(pipe: Any) -> dict[str, Any]:
    """Of a network, for a recipe: its weights' hash, None where it was exported, or where they are rounded to float16:
    the hash is that of bfloat16, also where they are float32."""
    import torch

    from .evaluation.store import weights_content

    known = isinstance(pipe.unet, torch.nn.Module) and pipe.unet.dtype != torch.float16
    return {"weights": weights_content(pipe.unet.state_dict()) if known else None}


def _masked(mask: Any) -> dict[str, Any]:
    return {} if mask is None else {"mask_image": mask}


def _folder(work: _Work, mask: str | None) -> None:
    """Exit code 1 where some file failed. Several processes (accelerate launch) take every so many-th file each."""
    if work.output is None:
        raise ValueError(f"{work.source} is a folder: name one for the results by -o")
    if work.samples > 1:
        raise ValueError(f"samples is {work.samples}: of a folder, each photograph gets one")
    if "hints" in work.options:
        raise ValueError(f"hints are for one photograph, {work.source} is a folder")
    from . import canvas, folders, sizes
    from .files import alone
    from .tasks import get_task

    jobs = folders.plan(work.source, work.output, work.recursive, mask)
    if work.plan:
        todo = [job for job in jobs if work.overwrite or not job.target.exists()]
        print(f"{len(jobs)} photographs, {len(jobs) - len(todo)} there already" + ("; the next one:" if todo else ""))
        for job in todo:
            try:
                if job.problem:
                    raise ValueError(job.problem)
                picture = canvas.read(job.source, work.limit)
            except (ValueError, OSError) as error:
                print(f"palette: {job.source}: {' '.join(str(error).split())}", file=sys.stderr)
                continue
            _say_plan(work, job.source, picture, job.mask)
            break
        return
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    import torch

    pipe = _load(work.model, work.device, work.dtype, work.speed)
    pipe.set_progress_bar_config(disable=True)
    about = _about(pipe)

    def restore(some: list, pictures: list, masks: list | None) -> list:
        try:
            images = pipe(
                pictures, task=work.task, num_inference_steps=work.steps, max_pixels=work.limit,
                generator=[torch.Generator().manual_seed(work.seed) for _ in some], **_masked(masks), **work.options,
            ).images  # fmt: skip
        except sizes.NothingToExtend:  # of several, they are asked one by one
            if len(some) > 1:
                raise
            images = [canvas.to_pil(pictures[0].image, pictures[0])]
        made = [work.recipe(job.source, job.mask) | about for job in some]
        return [work.finish(image, recipe) for image, recipe in zip(images, made, strict=True)]

    with alone(work.output, rank):
        mine = jobs[rank::processes]
        otherwise = [] if work.overwrite else _made_otherwise(mine, work.settings(), about)
        batched = get_task(work.task).strategy not in ("hole", "tiles")  # else it is one photograph after the other
        report = folders.run(
            mine, restore, work.overwrite, work.limit, sys.stderr.isatty(), folders.AHEAD if batched else 1
        )
    print(f"{report.done} done, {report.skipped} there already, {len(report.failed)} failed")
    if otherwise:
        number = f"{len(otherwise)} of those" if len(otherwise) > 1 else "one of those"
        print(f"palette: {number} made otherwise ({otherwise[0]}): --overwrite makes them anew", file=sys.stderr)
    for path, why in report.failed:
        print(f"palette: {path}: {' '.join(why.split())}", file=sys.stderr)
    if report.failed:
        raise typer.Exit(1)


def _made_otherwise(jobs: list, settings: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Of each result that is there by other settings, which: "seed 0, now 1"; or that its photograph or mask, or the
    model's weights, changed since. Without a recipe nobody knows."""
    from . import recipes

    found = []
    for job in jobs:
        if job.problem:
            continue
        try:
            recipe = recipes.read(job.target)
        except (OSError, ValueError):
            continue
        other = [f"{k} {recipe.get(k)}, now {v}" for k, v in settings.items() if recipe.get(k) != v]
        other += ["by other weights"] if recipes.other_weights(about, recipe) else []
        files = _files(job, recipe)
        other += [f"{path} has changed" for path, kept in files if recipes.changed(path, kept, job.target)]
        found += ["; ".join(other)] if other else []
    return found


def _files(job: Any, recipe: dict[str, Any]) -> list[tuple[Path, dict[str, str]]]:
    """What a result was made of, and what its recipe says of it."""
    mask = recipe.get("mask")
    masked = [(job.mask, mask)] if isinstance(job.mask, Path) and isinstance(mask, dict) else []
    return [(job.source, recipe["source"]), *masked]


@app.command()
def colorize(
    source: Source, output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
    recursive: Recursive = False, overwrite: Overwrite = False, no_exif: NoExif = False, plan: PlanOnly = False,
    speed: Speed = None,
    hints: Annotated[Path | None, typer.Option(
        help="picture of the same size: strokes of the colours that things have, transparent elsewhere")] = None,
) -> None:  # fmt: skip
    """Colour for a grayscale photograph; its own luma is kept."""
    asked = locals()
    hints = asked.pop("hints")
    _run(task="colorization", options={} if hints is None else {"hints": str(hints)}, **asked)


@app.command()
def inpaint(
    source: Source,
    mask: Annotated[str, typer.Option(
        help="picture of the same size, white = generate (or a folder of them); or alpha, '#RRGGBB' as painted in, "
             "or a box LEFT,TOP,RIGHT,BOTTOM")],
    output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
    recursive: Recursive = False, overwrite: Overwrite = False, no_exif: NoExif = False, plan: PlanOnly = False,
    speed: Speed = None, texture: Texture = None,
) -> None:  # fmt: skip
    """Fill a hole; every other pixel is kept bit for bit."""
    asked = locals()
    _run(task="inpainting", options=_given(texture=asked.pop("texture")), **asked)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _amount(value: str) -> int | float:
    """ "64" => 64 pixels, "0.25" or "25%" => a fraction of the side."""
    try:
        return float(value[:-1]) / 100 if value.endswith("%") else int(value) if value.isdigit() else float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither pixels (64) nor a fraction (0.25 or 25%)") from None


def _aspect(value: str | None) -> float | None:
    """ "16:9" or "1.78" => width / height."""
    if value is None:
        return None
    try:
        across, _, down = value.partition(":")
        return float(across) / float(down or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{value!r} is no aspect ratio, expected 16:9 or 1.78") from None


Side = Annotated[str, typer.Option(help="pixels (64) or a fraction of the side (0.25 or 25%)")]


@app.command()
def uncrop(
    source: Source, left: Side = "0", right: Side = "0", top: Side = "0", bottom: Side = "0",
    aspect: Annotated[str | None, typer.Option(help="or the shape to reach on both sides evenly: 16:9")] = None,
    trim: Annotated[bool, typer.Option("--trim", help="make lines along the edges anew, as scans have them")] = False,
    output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
    recursive: Recursive = False, overwrite: Overwrite = False, no_exif: NoExif = False, plan: PlanOnly = False,
    speed: Speed = None, texture: Texture = None,
) -> None:  # fmt: skip
    """Extend a photograph beyond its border; the given pixels are kept bit for bit, but for lines that --trim takes."""
    asked = locals()
    options: dict[str, Any] = {side: _amount(asked.pop(side)) for side in ("left", "right", "top", "bottom")}
    options |= {"aspect": _aspect(asked.pop("aspect"))} | _given(texture=asked.pop("texture"))
    options |= _given(trim=asked.pop("trim") or None)
    _run(task="uncropping", options=options, **asked)


@app.command()
def restore(
    source: Source, output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
    recursive: Recursive = False, overwrite: Overwrite = False, no_exif: NoExif = False, plan: PlanOnly = False,
    speed: Speed = None,
    consistent: Annotated[bool | None, typer.Option(
        help="hold the result to what JPEG would store as the same file; default: where the file is a JPEG")] = None,
    eta: Annotated[float | None, typer.Option(
        min=0, max=1, help="0: close to the file; 1: most detail, which need not be the true one; default: the model's"
    )] = None,
) -> None:  # fmt: skip
    """Take the blocks and ringing out of a JPEG."""
    asked = locals()
    options = {"consistent": asked.pop("consistent")} | _given(eta=asked.pop("eta"))
    _run(task="jpeg_restoration", options=options, **asked)


@app.command()
def again(
    picture: Annotated[Path, typer.Argument(help="a PNG that this command wrote")],
    source: Annotated[Path | None, typer.Option(help="its photograph; default: beside it, by its name")] = None,
    mask: Annotated[Path | None, typer.Option(help="its mask, likewise")] = None,
    hints: Annotated[Path | None, typer.Option(help="its hints, likewise")] = None,
    model: Annotated[str | None, typer.Option(help="its model, where that has another name now")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="default: PICTURE-again.png")] = None,
    device: Device = "auto", max_megapixels: Limit = 50,
) -> None:  # fmt: skip
    """Make a picture again, by the recipe that is kept inside it."""
    _quiet()
    with _one_line():
        from . import canvas, recipes

        recipe = recipes.read(picture)
        target = output or picture.with_stem(f"{picture.stem}-again")
        canvas.kind_of(target)
        kept, recipe = recipe, recipe | {"options": dict(recipe["options"])}
        folder, hole = picture.parent, recipe.get("mask")
        if isinstance(hole, dict):
            hole = str(recipes.find(hole, folder, mask, "mask"))
        if "hints" in recipe["options"]:
            recipe["options"]["hints"] = str(recipes.find(recipe["options"]["hints"], folder, hints, "hints"))
        work = _Work(
            source=recipes.find(recipe["source"], folder, source, "source"), output=output, device=device,
            max_megapixels=max_megapixels, recursive=False, overwrite=False, plan=False,
            no_exif=recipe.get("no_exif", False), speed=recipe.get("speed"),
            model=recipe["model"] if model is None else model,
            **{k: recipe[k] for k in ("task", "dtype", "steps", "seed", "samples", "options")},
        )  # fmt: skip
        _spare([target], picture, work.source, hole, recipe["options"].get("hints"))
        images, about = _sample(work, canvas.read(work.source, work.limit), hole, recipe)
        canvas.save(work.finish(images[recipe["sample"]], kept | about | {"model": work.model}), target)
        print(target)


@app.command()
def info(model: Model = None) -> None:
    """What a checkpoint is and what this machine offers."""
    with _one_line():
        import diffusers
        import torch

        from . import __version__
        from .machine import best_dtype

        pipe = _load(model, "cpu", "float32")
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    print(f"palette-diffusers {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}")
    print(f"model: {model or 'starter'}, {parameters / 1e6:.1f}M parameters, {pipe.unet.config.sample_size} pixels")
    print(f"tasks: {', '.join(pipe.config.tasks)} (default {pipe.config.default_task})")
    print(f"solver: {type(pipe.scheduler).__name__}, {pipe.config.default_steps} steps")
    if pipe.config.student:
        print(f"student, for --speed fast: {pipe.config.student}")
    half = "yes" if best_dtype("cpu") == torch.bfloat16 else "no"
    print(f"devices: cpu{', cuda' if torch.cuda.is_available() else ''}; bfloat16 {half}")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="starter, a pipeline's folder or Hub id, a folder of results, FILE.py:FUNCTION, "
                                 "'COMMAND {inputs} {masks} {outputs}', or a baseline; NAME=... names its row")
    ],
    data: Annotated[str, typer.Option(help="originals: folder of images or of validation-*.parquet, or Hub id")],
    features: Annotated[str, typer.Option(help="FILE.py:FUNCTION, a transformers classifier, or inception")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder; a killed run goes on with the same command")],
    task: Annotated[str, typer.Option(help="names, with commas: colorization, jpeg_restoration:5, ...")] = "",
    protocol: Annotated[str, typer.Option(help="a set of tasks: starter, palette (the paper's)")] = "starter",
    register: Annotated[str | None, typer.Option(help="FILE.py that registers tasks of your own; it is run first")]
    = None,
    count: Annotated[int | None, typer.Option(min=1, help="the first so many photographs; default: all")] = None,
    against: Annotated[list[str], typer.Option(help="further rows: identity, telea, navier-stokes, or as MODEL")]
    = ["identity", "telea"],  # noqa: B006
    classifier: Annotated[str | None, typer.Option(help="whose accuracy is told; default: --features")] = None,
    names: Annotated[Path | None, typer.Option("--list", help="file of names in --data: ctest10k, places10k")] = None,
    reference: Annotated[str | None, typer.Option(help="set to compare with, like --data; default: the originals")]
    = None,
    manifest: Annotated[Path | None, typer.Option(help="another run's: the pixels must be the same")] = None,
    samples: Annotated[int, typer.Option(help="of each of the first 100 photographs, for diversity")] = 1,
    size: Annotated[int | None, typer.Option(min=8, help="pixels a side; default: the model's, else 64")] = None,
    batch: Annotated[int, typer.Option(min=1, help="photographs at a time")] = 50,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="of sources, samples and intervals")] = 0,
    device: Device = "auto", dtype: DType = "auto",
) -> None:  # fmt: skip
    """Measure restorers by the paper's protocol: tables, pictures and a page. Share it with accelerate launch."""
    _needs("datasets", "torchmetrics", install="'palette-diffusers[eval]'")
    _quiet()
    with _one_line(ImportError):
        from .evaluation.features import check_torchvision, load_features

        check_torchvision()  # before what imports it
        from .evaluation import inputs, load_lpips, run
        from .evaluation.pages import markdown
        from .evaluation.restorers import load_restorer
        from .machine import chosen_device

        if register is not None:
            inputs.register_tasks(register)
        if protocol not in inputs.PROTOCOLS:
            raise ValueError(f"protocol is {protocol!r}, expected {', '.join(inputs.PROTOCOLS)}")
        variants = [name.strip() for name in task.split(",")] if task else inputs.PROTOCOLS[protocol]
        run.processes()
        pipes: list[Any] = []

        def load(name: str | None) -> Any:
            pipes.append(_load(name, device, dtype))
            return pipes[-1]

        rows = [load_restorer(spec, load, steps) for spec in dict.fromkeys([*against, model])]
        pixels = size or (pipes[-1].unet.config.sample_size if pipes else 64)
        photographs = inputs.Photographs(data, pixels, count, names)
        others = inputs.Photographs(reference, pixels) if reference else None
        place = chosen_device(device)
        network = load_features(features, place)
        judge = load_features(classifier, place) if classifier not in (None, features) else None
        results = run.evaluate(
            rows, photographs, variants, network, output, judge, others, manifest, batch, samples, seed,
            lpips=load_lpips(place),
        )  # fmt: skip
        if results is not None:
            print(markdown(results), end="")
            print(output / "index.html")


@app.command("fool-rate")
def fool_rate(
    results: Annotated[Path, typer.Argument(help="folder of results")],
    originals: Annotated[Path, typer.Argument(help="folder of originals of the same names")],
    votes: Annotated[Path, typer.Option(help="SQLite file; the votes in it are kept")] = Path("votes.sqlite"),
    seconds: Annotated[float, typer.Option(help="that a pair is shown; the paper: 3 or 5")] = 3,
    count: Annotated[int | None, typer.Option(min=1, help="pairs, drawn by the seed; default: all")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of pairs, order and sides")] = 0,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 7861,
    export: Annotated[Path | None, typer.Option(help="write all votes as CSV, print the fool rate, and stop")] = None,
) -> None:  # fmt: skip
    """Ask people: a page that shows results beside originals, and the share that is taken for a photograph."""
    with _one_line(ImportError):
        from .evaluation.fool_rate import Study, build, check_export, find_pairs, say

        if export is not None:
            check_export(export, votes)
        study = Study(find_pairs(results, originals, count, seed), votes, seed)
        print(say(study.summary()), flush=True)
        if export is not None:
            study.export(export)
            print(export)
            return
        build(study, seconds).launch(server_name=host, server_port=port)


@app.command()
def publish(
    source: Annotated[str, typer.Argument(help="a pipeline's or a training run's folder, or starter")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub; created if it doesn't exist")],
    private: Annotated[bool, typer.Option("--private", help="a created repository is private")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="propose the commit as a pull request")] = False,
    dry_run: Annotated[Path | None, typer.Option(help="write the files to this folder, upload nothing")] = None,
    license: Annotated[str | None, typer.Option(help="as the Hub names it; default: the card's")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a data set of its training; repeatable")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that this one was tuned from")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="JSON of an evaluation, for the card's figures")] = None,
    photo: Annotated[list[Path] | None, typer.Option(help="picture that samples are made of; repeatable")] = None,
    sheet: Annotated[bool, typer.Option("--sheet", help="the run's sheet of samples, with photos of its data")] = False,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="even if edited on the Hub")] = False,
) -> None:  # fmt: skip
    """Upload a pipeline that loads with this package and without it."""
    with _one_line():
        from .hub import publish as upload

        url = upload(
            source, repo_id, private=private, create_pr=create_pr, dry_run=dry_run, license=license,
            datasets=dataset or (), base_model=base_model, evaluation=evaluation, photos=photo or (),
            sheet=sheet, overwrite_card=overwrite_card,
        )  # fmt: skip
    print(url)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Janspiry's .pth, guided-diffusion's .pt, or a UNet2DModel's folder")],
    output: Annotated[Path, typer.Argument(help="new folder for the pipeline")],
    config: Annotated[Path | None, typer.Option(help="Janspiry's configuration, JSON")] = None,
    head_channels: Annotated[
        int | None, typer.Option(help="channels of an attention head, which no checkpoint tells; 32 or 64 by kind")
    ] = None,
    new_attention_order: Annotated[
        bool, typer.Option("--new-attention-order", help="trained with use_new_attention_order")
    ] = False,
    image_size: Annotated[int | None, typer.Option(help="pixels a side; default: the configuration's, or 256")] = None,
    task: Annotated[list[str] | None, typer.Option(help="task it was trained for; repeatable")] = None,
    no_ema: Annotated[bool, typer.Option("--no-ema", help="not the averaged weights that lie beside")] = False,
    label: Annotated[
        int | None, typer.Option(min=0, help="the class to fold in, where the network is conditioned on classes")
    ] = None,
) -> None:
    """Take in a checkpoint of another implementation."""
    with _one_line():
        from .convert import convert as take_in

        folder = take_in(
            source, output, config=config, head_channels=head_channels, new_attention_order=new_attention_order,
            image_size=image_size, tasks=task or (), ema=not no_ema, label=label,
        )  # fmt: skip
    print(folder)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="a pipeline's folder or Hub id")],
    output: Annotated[Path, typer.Argument(help="new folder for the UNet2DModel and its DDPMScheduler")],
) -> None:
    """Write the network as diffusers' own UNet2DModel, where that can express it."""
    with _one_line():
        from .convert import export as write

        folder = write(source, output)
    print(folder)


@app.command("export-network")
def export_network(
    source: Annotated[str, typer.Argument(help="a pipeline's folder or Hub id, or starter")],
    output: Annotated[Path, typer.Argument(help="new folder; --model takes it")],
    format: Annotated[str, typer.Option(help="onnx (run by onnxruntime) or torch (torch.export)")] = "onnx",
) -> None:
    """Write the network as ONNX or a program of torch.export, checked against this one; float32, for CPUs."""
    _quiet()
    with _one_line(ImportError):
        pipe = _load(source, "cpu", "float32")
        from .portable import write_portable

        error = write_portable(pipe, output, format)
    print(f"{output}: differs by {error:.1e} at most")


@app.command()
def demo(
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="where the page is served")] = 7860,
    model: Model = None,
    device: Device = "auto",
    mcp: Annotated[bool, typer.Option("--mcp", help="serve the tasks as tools of an MCP server, too")] = False,
) -> None:
    """Open the demo: a page to mend photographs on."""
    _needs("gradio", install="'palette-diffusers[demo]'")
    if mcp:
        _needs("mcp", install="mcp")
    with _one_line():
        from .demo_files import own_folder

        own_folder()  # before gradio is imported, which reads where its files go
        from .demo import launch

        launch(model, host, port, device, mcp)


@app.command()
def publish_space(
    repo_id: Annotated[str, typer.Argument(help="USER/NAME of the Space on the Hub")],
    dry_run: Annotated[Path | None, typer.Option(help="write the files to this folder, publish nothing")] = None,
    private: Annotated[bool, typer.Option("--private", help="only you can open a created one")] = False,
    model: Annotated[str | None, typer.Option(help="Hub id of its model; default: the starter")] = None,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="even if edited on the Hub")] = False,
) -> None:
    """Publish the demo as a Space on the Hugging Face Hub."""
    with _one_line():
        from . import hub, space

        hub.check_name(repo_id)
        if dry_run is None:
            print(space.publish_space(repo_id, private, model, overwrite_card))
        else:
            print("\n".join(space.write_space(dry_run, model)))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
