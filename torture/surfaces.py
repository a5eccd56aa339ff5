"""What strangers can touch, and what must hold whatever they send: each surface is a strategy and a check.

A check passes by what is documented: a result that keeps the invariants, or ValueError, TypeError or OSError.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from palette_diffusers import PalettePipeline, canvas, masks, recipes, sizes
from palette_diffusers.cli import app
from palette_diffusers.tasks import get_task
from tests.conftest import toy_unet
from torture.files import PIXELS, Made, made_files, noise, sides

REFUSED = (ValueError, TypeError, OSError)
TASKS = ("colorization", "inpainting", "uncropping", "jpeg_restoration")
MEMORY = 500 * 2**20  # that any input may take, beside 100 bytes for each of its pixels


@dataclass(frozen=True)
class Surface:
    strategy: st.SearchStrategy
    check: Callable[[Any], str]  # the example => "accepted" or "refused"


@contextlib.contextmanager
def bounded(pixels: int = 0):
    """Memory beyond what an input may take is a finding (Linux: the kernel's high-water mark, set back)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _memory("VmRSS")
    yield
    took = _memory("VmHWM") - before
    assert took < MEMORY + 100 * pixels, f"took {took / 2**20:.0f} MiB for {pixels} pixels"


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def check_picture(picture: canvas.Picture) -> None:
    image, alpha = picture.image, picture.alpha
    assert image.dtype == torch.float32 and image.shape == (1, 3, *picture.size) and min(picture.size) >= 1
    assert torch.isfinite(image).all() and image.abs().max() <= 1
    if alpha is not None:
        assert alpha.shape == (1, 1, *picture.size) and torch.isfinite(alpha).all()
        assert 0 <= alpha.min() and alpha.max() <= 1
    assert set(picture.info) <= {"icc_profile", "exif"} and all(isinstance(v, bytes) for v in picture.info.values())


# files


def check_file(example: tuple[Made, str]) -> str:
    made, suffix = example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.png"
        path.write_bytes(made.content)
        with bounded(PIXELS):
            try:
                picture = canvas.read(path, PIXELS)
            except REFUSED:
                return "refused"
        check_picture(picture)
        assert picture.size[0] * picture.size[1] <= PIXELS
        assert torch.equal(canvas.read(path, PIXELS).image, picture.image)
        # what was read can be written: a photograph must not be lost at the end of the work
        out = Path(folder) / f"out{suffix}"
        canvas.save(canvas.to_pil(picture.image, picture), out)
        again = canvas.read(out, PIXELS)
        assert again.size == picture.size
        if suffix != ".jpg":
            assert (
                np.array_equal(canvas.to_uint8(again.image), canvas.to_uint8(picture.image))
                or picture.alpha is not None
            )
        assert [p.name for p in sorted(Path(folder).iterdir())] == sorted({out.name, "photo.png"})
    return "accepted"


# arrays and tensors


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    height, width = draw(sides(5000))
    seed, channels = draw(st.integers(0, 9999)), draw(st.sampled_from([1, 3, 3, 3, 4, 2, 5]))
    pixels = noise(height, width, channels, seed)
    kind = draw(st.sampled_from(["uint8", "uint16", "float", "float", "tensor", "tensor", "odd"]))
    if kind == "uint8":
        return pixels[..., 0] if draw(st.booleans()) else pixels[::-1] if draw(st.booleans()) else pixels
    if kind == "uint16":
        return pixels.astype(np.uint16) * 257
    if kind == "odd":
        return draw(st.sampled_from([
            pixels.astype(np.int64), pixels > 3, pixels.astype(complex), np.zeros((0, 4, 3)), np.zeros((4,)),
            np.empty((2, 2, 3), object), pixels[None], torch.zeros(0, 3, 4), torch.zeros(1, 3, 0, 2), None, 3, b"x", "",
            "nothing", "a\0b", "x" * 5000, Path(), [], torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.long),
            torch.zeros(3, 4, 4, requires_grad=True), torch.zeros(3, 4, 4, dtype=torch.complex64),
        ]))  # fmt: skip
    values = pixels.astype(draw(st.sampled_from([np.float16, np.float32, np.float64]))) / 255
    spoil = draw(st.sampled_from([None, None, None, np.nan, np.inf, -0.5, 1.5, 255, 1e-5]))
    if spoil is not None:
        values.flat[seed % values.size] = spoil
    if kind == "float":
        return values
    tensor = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1) * 2 - 1
    return tensor.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))


def check_array(source: Any) -> str:
    try:
        with bounded(getattr(source, "size", 0) if isinstance(source, np.ndarray) else 0 if source is None else PIXELS):
            picture = canvas.read(source)
    except REFUSED:
        return "refused"
    check_picture(picture)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        pixels = source[..., None] if source.ndim == 2 else source
        assert np.array_equal(canvas.to_uint8(picture.image)[..., : min(3, pixels.shape[-1])], pixels[..., :3])
    return "accepted"


# masks


@st.composite
def drawn_masks(draw: st.DrawFn) -> tuple:
    height, width = draw(sides(2000))
    kind = draw(st.sampled_from(["free", "rectangle", "border", "uncropping", "center", "words", "array", "array"]))
    whole = st.integers(-3, 2500)
    if kind in ("free", "rectangle"):
        area = draw(st.sampled_from([(0.1, 0.4), (0.2, 0.3), (0.01, 0.02), (0.5, 0.9), (0.4, 0.1), (0, 1), (-1, 2)]))
        return kind, min(height, 300), min(width, 300), area, draw(st.integers(0, 99))
    if kind == "border":
        return kind, height, width, draw(st.tuples(whole, whole, whole, whole)), 0
    if kind == "center":
        return kind, height, width, draw(st.floats(-1, 2)), 0
    if kind == "words":
        box = ",".join(map(str, draw(st.lists(st.integers(0, 90), min_size=3, max_size=5))))
        words = st.sampled_from(["alpha", "#00ff00", "#FFFFFF", "#0", "9,9", box, box, "0,0,1,1", "٣,0,4,4", "²,0,4,4"])
        return kind, height, width, draw(words), draw(st.integers(0, 99))
    return (
        kind,
        height,
        width,
        draw(st.sampled_from(["bool", "uint8", "float", "tensor", "swapped", "nan"])),
        draw(st.integers(0, 99)),
    )


def check_mask(example: tuple) -> str:
    kind, height, width, option, seed = example
    generator = torch.Generator().manual_seed(seed)
    try:
        if kind in ("free", "rectangle"):
            draw = masks.free_form_mask if kind == "free" else masks.rectangle_mask
            mask = draw(height, width, generator, area=option)
            assert torch.equal(mask, draw(height, width, torch.Generator().manual_seed(seed), area=option))
        elif kind == "border":
            left, right, top, bottom = option
            mask = masks.border_mask(height, width, left, right, top, bottom)
            assert int((1 - mask).sum()) == (width - left - right) * (height - top - bottom) > 0
        elif kind == "center":
            mask = masks.center_mask(height, width, option)
        elif kind == "uncropping":
            mask = masks.uncropping_mask(height, width, generator)
        else:
            picture = canvas.read(noise(height, width, 4 if seed % 2 else 3, seed))
            source = option if kind == "words" else _mask_source(option, height, width, seed)
            mask = canvas.mask_for(source, picture)[0]
            assert mask.any() and not mask.all()
    except REFUSED:
        return "refused"
    assert mask.shape == (1, height, width) and mask.dtype == torch.float32 and ((mask == 0) | (mask == 1)).all()
    hole = mask[None]
    if mask.any() and not mask.all() and height * width < 200_000:
        parts = list(sizes.separate(hole))
        assert torch.equal(torch.stack(parts).sum(0), hole)
        values = torch.rand(1, 3, height, width, generator=generator)
        smooth = masks.extend(values, 1 - hole)
        assert torch.isfinite(smooth).all() and torch.equal(
            smooth[(hole < 1).expand_as(smooth)], values[(hole < 1).expand_as(values)]
        )
        grown = masks.grow(hole, seed % 5)
        assert (grown >= hole).all()
    return "accepted"


def _mask_source(kind: str, height: int, width: int, seed: int) -> Any:
    pixels = noise(height, width, 1, seed)[..., 0]
    if kind == "tensor":
        return torch.from_numpy(pixels > 200).float()
    if kind == "nan":
        return torch.full((height, width), float("nan"))
    if kind == "swapped":
        return pixels.T.copy()
    return {"bool": pixels > 128, "uint8": pixels, "float": pixels / 255.0}[kind]


# sizes


@st.composite
def photographs(draw: st.DrawFn) -> tuple:
    height, width = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    native, multiple = draw(st.sampled_from([(64, 8), (32, 4), (64, 16), (128, 32), (256, 32)]))
    return height, width, native, multiple, draw(st.integers(0, 9999))


def check_sizes(example: tuple) -> str:
    height, width, native, multiple, seed = example
    view = sizes.fit(height, width, native, multiple)
    assert all(o % multiple == 0 and o >= i >= 1 for o, i in zip(view.outer, view.inner, strict=True))
    assert view.inner[0] * view.inner[1] <= 17 * native * native + height + width, "more work than the picture is worth"
    tile, overlap = max(128, native), 16
    places = sizes.tile_places(height, width, tile, overlap)
    covered = np.zeros((height, width), bool)
    for y, x in places:
        covered[y : y + tile, x : x + tile] = True
    assert covered.all() and len(set(places)) == len(places)
    check_blocks(height, width, multiple)
    rng = np.random.default_rng(seed)
    top, left = int(rng.integers(height)), int(rng.integers(width))
    mask = torch.zeros(1, 1, height, width)
    mask[..., top : top + int(rng.integers(1, height + 1)), left : left + int(rng.integers(1, width + 1))] = 1
    hole = sizes.hole_view(mask, native, multiple)
    assert hole.crop(mask).sum() == mask.sum()
    levels = hole.levels(multiple)
    assert levels[-1].inner == (hole.height, hole.width) and len(levels) < 12
    if not mask.all() and height * width < 1_000_000:
        image = torch.from_numpy(noise(height, width, 3, seed)).permute(2, 0, 1)[None] / 127.5 - 1
        small, small_hole = hole.look_known(image, mask)
        assert small.shape[-2:] == hole.outer and torch.isfinite(small).all() and small.abs().max() <= 1
        assert ((small_hole == 0) | (small_hole == 1)).all()
        assert torch.isfinite(view.look(image)).all() and view.back(view.look(image)).shape == image.shape
        assert torch.isfinite(sizes.grain(image, mask)).all()
    return "accepted"


def check_blocks(height: int, width: int, multiple: int) -> None:
    laid, small = torch.zeros(1, 1, height, width), torch.rand(1, 1, 50, 70)
    for block in sizes.blocks(height, width, multiple):
        assert all(o % multiple == 0 and o >= n for o, n in zip(block.outer, (block.height, block.width), strict=True))
        sizes.lay(laid, torch.full((1, 1, block.height, block.width), 0.25), block)
        if height * width < 1_000_000 and height > 50 and width > 70:
            up = sizes.enlarged(small, (height, width), block)
            assert (up - block.crop(sizes.resize(small, (height, width)))).abs().max() < 1e-4
    assert (laid == 0.25).all(), "blocks that agree are changed, or do not cover"


# tasks


@st.composite
def given_tasks(draw: st.DrawFn) -> tuple:
    height, width = draw(sides(900))
    return draw(st.sampled_from(TASKS)), height, width, draw(st.integers(0, 9999))


def check_task(example: tuple) -> str:
    name, height, width, seed = example
    task = get_task(name)
    clean = torch.from_numpy(noise(height, width, 3, seed)).permute(2, 0, 1)[None] / 127.5 - 1
    try:
        given = task.degrade(clean, torch.Generator().manual_seed(seed))
    except REFUSED:
        assert min(height, width) < 2, "a picture was refused"
        return "refused"
    again = task.degrade(clean, torch.Generator().manual_seed(seed))
    assert torch.equal(given.known, again.known) and torch.equal(given.condition, again.condition)
    sample = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 1)) * [1, 30][seed % 2]
    out = task.compose(sample, given)
    for image in (given.known, given.condition, out):
        assert image.shape == clean.shape and image.dtype == torch.float32 and torch.isfinite(image).all()
    assert out.abs().max() <= 1
    if given.mask is not None:
        keep = (given.mask < 0.5).expand_as(out)
        assert torch.equal(out[keep], clean[keep]) and torch.equal(given.known[keep], clean[keep])
    if name == "colorization":
        assert (canvas_luma(out) - canvas_luma(clean)).abs().max() < 1 / 255
    return "accepted"


def canvas_luma(image: torch.Tensor) -> torch.Tensor:
    from palette_diffusers.color import luma

    return luma(image)


# pipeline


@cache
def toy_pipe(holes: bool) -> PalettePipeline:
    from palette_diffusers import PaletteScheduler

    options = dict(hole_skip=0.5, condition_skip=0.2) if holes else {}
    kind = "v_prediction" if holes else "epsilon"
    scheduler = PaletteScheduler(prediction_type=kind, sampling_spacing="logsnr", sampling_variance="fixed_small")
    pipe = PalettePipeline(toy_unet(**options), scheduler, default_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    height, width = draw(sides(draw(st.sampled_from([90] * 6 + [250] * 3 + [1200]))))
    block = draw(st.sampled_from([sizes.BLOCK, sizes.BLOCK, 160]))
    if draw(st.integers(0, 2)) == 0:  # as long as so many blocks, and a little more or less
        step, count = block - sizes.LAP, draw(st.integers(1, 3 if block == 160 else 2))
        long = sizes.LAP + count * step + draw(st.sampled_from([-16, -1, 0, 1, 2, 7, 15, 16, 17, 49]))
        height, width = draw(st.sampled_from([(long, min(width, 120)), (min(height, 120), long)]))
        if block == 160 and draw(st.booleans()):
            height, width = long, draw(st.integers(150, 290))
    side = st.one_of(
        st.just(0), st.integers(0, 40), st.floats(0, 0.7), st.sampled_from([0, 1, -2, float("nan"), 10**9])
    )
    options: dict[str, Any] = dict(
        task=draw(st.sampled_from(TASKS)),
        num_inference_steps=draw(st.sampled_from([1] * 8 + [2, 2, 3, None, 0, 2.5])),
        num_images_per_input=draw(st.sampled_from([1] * 8 + [2, 2, 0])),
    )
    if draw(st.integers(0, 5)) == 0:
        options["eta"] = draw(st.sampled_from([0, 0.5, 1, 2, float("nan")]))
    if options["task"] == "uncropping":
        options |= {name: draw(side) for name in ("left", "right", "top", "bottom")}
        if draw(st.integers(0, 5)) == 0:
            options |= {name: 0 for name in ("left", "right", "top", "bottom")}
            options["aspect"] = draw(st.sampled_from([1.0, 1.5, 3.0, 0.0, -1.0, float("inf"), float("nan"), 1e-9]))
    hole = (
        draw(st.sampled_from(["box"] * 5 + ["dots"] * 2 + ["alpha", "none", "full", "words"]))
        if options["task"] == "inpainting"
        else ""
    )
    return height, width, block, draw(st.integers(0, 9999)), hole, draw(st.booleans()), options


def check_call(example: tuple) -> str:
    usual, sizes.BLOCK = sizes.BLOCK, example[2]
    try:
        return _check_call(example)
    finally:
        sizes.BLOCK = usual


def _check_call(example: tuple) -> str:
    height, width, _, seed, hole, holes, options = example
    pixels = noise(height, width, 4 if hole == "alpha" or seed % 4 == 0 else 3, seed)
    options, pipe = dict(options), toy_pipe(holes)
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    if hole:
        top, left = int(rng.integers(height)), int(rng.integers(width))
        mask[top : top + 1 + height // 3, left : left + 1 + width // 3] = 255
        if hole == "dots":
            mask = (rng.random((height, width)) < 0.01).astype(np.uint8) * 255
        if hole == "full":
            mask[:] = 255
        words = {"alpha": "alpha", "words": f"{left},{top},{left + 3},{top + 2}", "none": None}
        options["mask_image"] = words.get(hole, mask)
    try:
        with bounded(60 * height * width + 4_000_000):
            out = pipe(pixels, generator=torch.Generator().manual_seed(seed), max_pixels=2_000_000, **options).images
    except REFUSED:
        return "refused"
    assert len(out) == options["num_images_per_input"]
    for image in out:
        result = np.asarray(image.convert("RGB"))
        if options["task"] == "uncropping":
            assert image.width >= width and image.height >= height
        else:
            assert image.size == (width, height)
        if options["task"] == "inpainting" and isinstance(options["mask_image"], np.ndarray):
            assert np.array_equal(result[mask < 128], pixels[..., :3][mask < 128])
        if options["task"] == "uncropping" and "aspect" not in options:
            top, left = (
                round(options[n] * s) if isinstance(options[n], float) else options[n]
                for n, s in (("top", height), ("left", width))
            )
            assert np.array_equal(result[top : top + height, left : left + width], pixels[..., :3])
    if seed % 5 == 0:
        again = pipe(pixels, generator=torch.Generator().manual_seed(seed), max_pixels=2_000_000, **options).images
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(out, again, strict=True))
    return "accepted"


# the command


@cache
def model_folder() -> str:
    folder = tempfile.mkdtemp(prefix="torture-model-")
    toy_pipe(False).save_pretrained(folder)
    return folder


@st.composite
def commands(draw: st.DrawFn) -> tuple:
    made = draw(made_files(60))
    word = st.sampled_from(["0", "1", "-1", "0.5", "25%", "1e9", "nan", "inf", "x", "", "²", "64", "%", "9" * 400])
    command = draw(st.sampled_from(["colorize", "restore", "inpaint", "uncrop", "again", "folder"]))
    more = []
    if command == "inpaint":
        more += [
            "--mask",
            draw(st.sampled_from(["alpha", "#000000", "#ffffff", "0,0,1,1", "0,0,3,2", "nowhere.png", "", "PHOTO"])),
        ]
    if command == "uncrop":
        more += [draw(st.sampled_from(["--left", "--right", "--top", "--bottom", "--aspect"])), draw(word)]
    if command == "restore" and draw(st.booleans()):
        more += ["--eta", draw(st.sampled_from(["0", "0.5", "1", "2", "nan", "x"]))]
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(["--seed", "--samples", "--max-megapixels", "--dtype", "--device", "--steps"]))
        more += [name, draw(word) if name != "--samples" else draw(st.sampled_from(["0", "-1", "x", "2"]))]
    output = draw(
        st.sampled_from(
            ["out.png", "out.jpg", "out.xyz", "no/out.png", "PHOTO", "out", "a\0b.png", ".png", "x" * 300 + ".png"]
        )
    )
    recipe = draw(hostile_recipes()) if command == "again" else ""
    return command, made, more, output, recipe


@st.composite
def hostile_recipes(draw: st.DrawFn) -> str:
    value = st.sampled_from(
        [None, 0, -1, 1, 99, 1e9, "", "x", "../../etc/passwd", [], {}, {"name": ".."}, True, "a\0b"]
    )
    sound = {
        "task": "colorization", "source": {"name": "source.png", "sha256": "SHA"}, "mask": None, "model": "MODEL",
        "dtype": "float32", "steps": 1, "seed": 0, "sample": 0, "samples": 1, "options": {},
    }  # fmt: skip
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from(["", "null", "3", "[]", "[" * 100_000, "{}", '"x"', "{", "\ud83d"]))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(sound)))
        if draw(st.integers(0, 4)) == 0:
            del sound[name]
            break
        if name != "model":  # another model is another door: the network is not there
            sound[name] = draw(value)
    return json.dumps(sound)


def check_command(example: tuple) -> str:
    command, made, more, output, recipe = example
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo, target = folder / "photo.png", folder / output.replace("PHOTO", "photo.png")
        photo.write_bytes(made.content)
        arguments = [command, str(photo), "-o", str(target), *more]
        if command == "folder":
            (folder / "album").mkdir()
            photo.rename(folder / "album" / "photo.png")
            photo = folder / "album" / "photo.png"
            arguments = ["colorize", str(folder / "album"), "-o", str(target), *more]
        if command == "again":
            _with_recipe(folder, recipe)
            arguments = ["again", str(folder / "kept.png"), "-o", str(target)]
        else:
            arguments += ["--model", model_folder()]
            arguments += [] if "--steps" in more else ["--steps", "1"]
        arguments = [a.replace("PHOTO", str(photo)) if a == "PHOTO" else a for a in arguments]
        before = photo.read_bytes() if command != "again" else b""
        with bounded(40_000_000):
            done = CliRunner().invoke(app, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code in (0, 1, 2) and (done.exit_code != 1 or command == "folder"), done.output
        assert "Traceback" not in done.output
        assert command == "again" or photo.read_bytes() == before, "the photograph was changed"
        assert not list(folder.rglob("*.part"))
        return "accepted" if done.exit_code == 0 else "refused"


def _with_recipe(folder: Path, recipe: str) -> None:
    Image.fromarray(noise(20, 24, 3, 2)).save(folder / "source.png")
    digest = recipes.fingerprint(folder / "source.png")["sha256"]
    image = Image.fromarray(noise(20, 24, 3, 2))
    image.info[canvas.RECIPE] = recipe.replace("SHA", digest).replace('"MODEL"', json.dumps(model_folder()))
    with contextlib.suppress(UnicodeEncodeError):
        canvas.save(image, folder / "kept.png")


SURFACES = {
    "files": Surface(st.tuples(made_files(), st.sampled_from([".png", ".jpg", ".webp", ".tif"])), check_file),
    "arrays": Surface(arrays(), check_array),
    "masks": Surface(drawn_masks(), check_mask),
    "sizes": Surface(photographs(), check_sizes),
    "tasks": Surface(given_tasks(), check_task),
    "pipeline": Surface(calls(), check_call),
    "commands": Surface(commands(), check_command),
}
