"""The `palette` command. Thin: everything it does, the pipeline does. Heavy imports stay inside the commands."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Mend photographs with a Palette diffusion model.", no_args_is_help=True, pretty_exceptions_enable=False
)

Source = Annotated[Path, typer.Argument(help="the photograph")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="file to write; default: IN-TASK.png beside IN")]
Steps = Annotated[int | None, typer.Option(help="network evaluations; default: the checkpoint's")]
Seed = Annotated[int, typer.Option(help="the same seed makes the same picture")]
Samples = Annotated[int, typer.Option(help="variations to write (OUT-1, OUT-2, ...)")]
Model = Annotated[str | None, typer.Option(help="folder or Hub id; default: the starter checkpoint")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Limit = Annotated[float, typer.Option(help="larger files are refused before they are decoded")]


def _fail(message: object) -> None:
    """One clear line, exit code 2."""
    print(f"palette: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(2)


def _load(model: str | None, device: str, dtype: str) -> Any:
    import torch

    from .machine import best_device, best_dtype
    from .pipeline import PalettePipeline

    device = best_device() if device == "auto" else device
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in ("auto", *known):
        raise ValueError(f"dtype is {dtype!r}, expected auto, {', '.join(known)}")
    pipe = PalettePipeline.from_pretrained(model, dtype=best_dtype(device) if dtype == "auto" else known[dtype])
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def _run(
    task: str, source: Path, output: Path | None, steps: int | None, seed: int, samples: int, model: str | None,
    device: str, dtype: str, max_megapixels: float, **options: Any,
) -> None:  # fmt: skip
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    target = output or source.with_name(f"{source.stem}-{task}.png")
    try:
        from PIL import Image

        if target.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{target.name}: unknown suffix {target.suffix!r}, expected .png, .jpg, .webp or .tif")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is no folder: the picture can't be written there")
        if target.resolve() == source.resolve():
            raise ValueError(f"{target} is the input: name another output")
        from . import canvas

        limit = round(max_megapixels * 1e6)
        picture = canvas.read(source, limit)  # before the model is loaded: bad input answers at once
        import torch

        pipe = _load(model, device, dtype)
        images = pipe(
            picture,
            task=task,
            num_inference_steps=steps,
            num_images_per_input=samples,
            generator=torch.Generator().manual_seed(seed),
            max_pixels=limit,
            **options,
        ).images
        for i, image in enumerate(images):
            path = target if samples == 1 else target.with_stem(f"{target.stem}-{i + 1}")
            canvas.save(image, path)
            print(path)
    except (ValueError, TypeError, OSError) as error:
        _fail(error)


@app.command()
def colorize(
    source: Source, output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
) -> None:  # fmt: skip
    """Colour for a grayscale photograph; its own luma is kept."""
    _run("colorization", source, output, steps, seed, samples, model, device, dtype, max_megapixels)


@app.command()
def inpaint(
    source: Source,
    mask: Annotated[Path, typer.Option(help="picture of the same size, white = generate")],
    output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
) -> None:  # fmt: skip
    """Fill a hole; every other pixel is kept bit for bit."""
    _run("inpainting", source, output, steps, seed, samples, model, device, dtype, max_megapixels, mask_image=mask)


def _amount(value: str) -> int | float:
    """ "64" => 64 pixels, "0.25" or "25%" => a fraction of the side."""
    try:
        return float(value[:-1]) / 100 if value.endswith("%") else int(value) if value.isdigit() else float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither pixels (64) nor a fraction (0.25 or 25%)") from None


Side = Annotated[str, typer.Option(help="pixels (64) or a fraction of the side (0.25 or 25%)")]


@app.command()
def uncrop(
    source: Source, left: Side = "0", right: Side = "0", top: Side = "0", bottom: Side = "0",
    output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
) -> None:  # fmt: skip
    """Extend a photograph beyond its border; the given pixels are kept bit for bit."""
    sides = {k: _amount(v) for k, v in (("left", left), ("right", right), ("top", top), ("bottom", bottom))}
    _run("uncropping", source, output, steps, seed, samples, model, device, dtype, max_megapixels, **sides)


@app.command()
def restore(
    source: Source, output: Output = None, steps: Steps = None, seed: Seed = 0, samples: Samples = 1,
    model: Model = None, device: Device = "auto", dtype: DType = "auto", max_megapixels: Limit = 50,
) -> None:  # fmt: skip
    """Take the blocks and ringing out of a JPEG."""
    _run("jpeg_restoration", source, output, steps, seed, samples, model, device, dtype, max_megapixels)


@app.command()
def info(model: Model = None) -> None:
    """What a checkpoint is and what this machine offers."""
    try:
        import diffusers
        import torch

        from . import __version__
        from .machine import best_dtype

        pipe = _load(model, "cpu", "float32")
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    print(f"palette-diffusers {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}")
    print(f"model: {model or 'starter'}, {parameters / 1e6:.1f}M parameters, {pipe.unet.config.sample_size} pixels")
    print(f"tasks: {', '.join(pipe.config.tasks)} (default {pipe.config.default_task})")
    print(f"solver: {type(pipe.scheduler).__name__}, {pipe.config.default_steps} steps")
    half = "yes" if best_dtype("cpu") == torch.bfloat16 else "no"
    print(f"devices: cpu{', cuda' if torch.cuda.is_available() else ''}; bfloat16 {half}")


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
    try:
        from .hub import publish as upload

        url = upload(
            source, repo_id, private=private, create_pr=create_pr, dry_run=dry_run, license=license,
            datasets=dataset or (), base_model=base_model, evaluation=evaluation, photos=photo or (),
            sheet=sheet, overwrite_card=overwrite_card,
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
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
) -> None:
    """Take in a checkpoint of another implementation."""
    try:
        from .convert import convert as take_in

        folder = take_in(
            source, output, config=config, head_channels=head_channels, new_attention_order=new_attention_order,
            image_size=image_size, tasks=task or (), ema=not no_ema,
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
    print(folder)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="a pipeline's folder or Hub id")],
    output: Annotated[Path, typer.Argument(help="new folder for the UNet2DModel and its DDPMScheduler")],
) -> None:
    """Write the network as diffusers' own UNet2DModel, where that can express it."""
    try:
        from .convert import export as write

        folder = write(source, output)
    except (ValueError, TypeError, OSError) as error:
        _fail(error)
    print(folder)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
