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
def demo(
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="where the page is served")] = 7860,
    model: Model = None,
    device: Device = "auto",
    mcp: Annotated[bool, typer.Option("--mcp", help="serve the tasks as tools of an MCP server, too")] = False,
) -> None:
    """Open the demo: a page to mend photographs on."""
    from importlib.util import find_spec

    missing = [name for name, wanted in (("gradio", True), ("mcp", mcp)) if wanted and find_spec(name) is None]
    if missing:
        _fail(f"{' and '.join(missing)} is missing: pip install 'palette-diffusers[demo]'{' mcp' if mcp else ''}")
    try:
        from .demo import launch

        launch(model, host, port, device, mcp)
    except (ValueError, TypeError, OSError) as error:
        _fail(error)


@app.command()
def publish_space(
    repo_id: Annotated[str, typer.Argument(help="USER/NAME of the Space on the Hub")],
    dry_run: Annotated[Path | None, typer.Option(help="write the files to this folder, publish nothing")] = None,
    private: Annotated[bool, typer.Option("--private", help="only you can open it")] = False,
) -> None:
    """Publish the demo as a Space on the Hugging Face Hub."""
    from . import space

    try:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        if dry_run is None:
            print(space.publish_space(repo_id, private))
        else:
            print("\n".join(space.write_space(dry_run)))
    except (ValueError, OSError) as error:
        _fail(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
