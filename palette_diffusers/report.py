"""What a training run shows of itself: its log, sheets of samples, a page with curves, and the card."""

import html
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from . import canvas
from .files import write_text
from .settings import TrainSettings
from .sources import split_sources
from .tasks import Task, fill_holes, get_task, task_names

BINS = (-6.0, -3.0, 0.0, 3.0, 6.0)  # log-SNR; six bins


class Tally:
    """The losses between two lines of the log, by task and by log-SNR, and how long the data was waited for."""

    def __init__(self, tasks: list[str], log: Path):
        self.tasks, self.log = tasks, log
        self._unused = torch.zeros(2, dtype=torch.float32)  # skipped, gray; of all lines
        self.left_out = 0  # steps, of all lines
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, len(self.tasks) * (len(BINS) + 1), dtype=torch.float64)  # losses, counts
        self._counts = torch.zeros(3, dtype=torch.float64)  # samples, those a critic looked at, and told
        self._waited, self._begin, self._bad = 0.0, time.perf_counter(), False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def add(self, losses: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """losses (B,) of a batch of `PaletteDataset`, both in the processor's memory."""
        losses = losses.double()
        self._bad |= not bool(torch.isfinite(losses).all())
        logsnr = torch.logit(batch["gamma"].double())
        cell = batch["task"] * (len(BINS) + 1) + torch.bucketize(logsnr, torch.tensor(BINS, dtype=torch.float64))
        counts = batch.get("taught", torch.ones_like(losses)).double()
        told = batch.get("told", torch.zeros(0))
        self._counts += torch.tensor([len(losses), len(told), float(told.sum())])
        self._sums[0].index_add_(0, cell, losses * counts)
        self._sums[1].index_add_(0, cell, counts)
        self._unused += torch.tensor([float(batch["skipped"].sum()), float(batch["gray"].sum())])

    def finite(self) -> bool:
        return not self._bad

    def line(self, accelerator: Any, step: int) -> dict[str, Any]:
        """Closes a line: all processes together, written to the log by the main one."""
        seconds = time.perf_counter() - self._begin
        sums, unused, samples = self._sums, self._unused, self._counts
        if accelerator.num_processes > 1:
            sums, unused, samples = (
                accelerator.reduce(x.float().to(accelerator.device)).cpu() for x in (sums, unused, samples)
            )
        losses, counts = sums.reshape(2, len(self.tasks), -1)

        def mean(dim: int) -> list[float | None]:
            share = zip(losses.sum(dim).tolist(), counts.sum(dim).tolist(), strict=True)
            return [round(a / b, 5) if b else None for a, b in share]

        line = {
            "step": step,
            "loss": round((losses.sum() / counts.sum()).item(), 5) if counts.sum() else None,
            "samples_per_second": round(samples[0].item() / seconds, 1),
            "waiting": round(self._waited / seconds, 3),
            "tasks": dict(zip(self.tasks, mean(1), strict=True)),
            "logsnr": mean(0),
            "skipped": int(unused[0]),
            "gray": int(unused[1]),
            "left_out": self.left_out,
        }
        if samples[1]:
            line["told"] = round((samples[2] / samples[1]).item(), 3)
        if accelerator.is_main_process:
            half = self.log.is_file() and self.log.read_bytes()[-1:] not in (b"", b"\n")  # left by a kill
            with open(self.log, "a") as log:
                log.write("\n" * half + json.dumps(line) + "\n")
        self._reset()
        return line


def read_log(path: Path) -> list[dict]:
    """The lines of a log, in order of steps; of a step that was done twice, the last. A half line is left out."""
    lines: dict[int, dict] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def cut_back(folder: Path, step: int) -> None:
    """A run's log and sheets of samples end where its last state does: a run that died was ahead of it, and one that
    begins anew has none."""
    log = folder / "log.jsonl"
    lines = [line for line in read_log(log) if line["step"] <= step]
    if log.is_file():
        write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
    for sheet in (folder / "samples").glob("step-*.png"):
        number = sheet.stem.removeprefix("step-")  # others are not the run's
        if number.isdecimal() and int(number) > step:
            sheet.unlink()


def draw_grid(rows: list[tuple[str, torch.Tensor]], path: Path) -> None:
    """Named rows of pictures (N, 3, H, W), in [-1, 1] => one PNG."""
    height, width = rows[0][1].shape[-2:]
    number = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (120 + number * (width + 2), len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(rows):
        draw.text((4, i * (height + 2) + height // 2 - 6), name[:19], fill="black")
        for k, picture in enumerate(pictures):
            pixels = Image.fromarray(canvas.to_uint8(picture[None].clamp(-1, 1)))
            sheet.paste(pixels, (120 + k * (width + 2), i * (height + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(sheet, path)


def draw_batch(batch: dict[str, torch.Tensor], tasks: list[str], path: Path) -> None:
    """The sources and targets of a batch, by task, up to 8 of each."""
    rows = []
    for number, task in enumerate(tasks):
        some = torch.nonzero(batch["task"] == number).flatten()[:8]
        if len(some):
            rows += [(task, fill_holes(batch["condition"][some])[:, :3]), ("", batch["clean"][some])]
    draw_grid(rows, path)


def draw_samples(unet: Any, scheduler: Any, dataset: Any, steps: int, path: Path, number: int = 6) -> None:
    """Source, sample and original of fixed images with fixed noise, for every task that was trained."""
    from .pipeline import PalettePipeline
    from .tasks import Given, get_task

    pipe = PalettePipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for name in dataset.tasks:
        fixed = dataset.fixed(name, number)
        given = Given.cat([given for _, given in fixed])
        generators = [torch.Generator().manual_seed(10_000 + k) for k in range(number)]
        sample = pipe.denoise(given, generators, steps, task=get_task(name)).cpu()
        out = get_task(name).compose(sample, given)
        rows += [(name, given.known), ("sample", out), ("original", torch.cat([clean for clean, _ in fixed]))]
    draw_grid(rows, path)


# the page


def _curve(points: list[tuple[float, float]], color: str, box: tuple[float, float, float, float]) -> str:
    x0, x1, y0, y1 = box
    places = [(60 + 600 * (x - x0) / max(1e-9, x1 - x0), 230 - 200 * (y - y0) / max(1e-9, y1 - y0)) for x, y in points]
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{color}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _chart(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return ""
    xs, low = [x for x, _ in points], min(y for _, y in points)
    begin, end = min(xs), max(xs)
    high = max(y for x, y in points if x >= begin + 0.02 * (end - begin))  # the first steps would flatten all others
    box = (begin, end, low, max(high, low + 1e-9))
    colors = ("#1b6ac9", "#c9501b", "#2a8f3c", "#8a3bb0", "#b08a10", "#107f8a")
    lines, legend = [], []
    for i, (name, curve) in enumerate(curves.items()):
        lines.append(_curve([(x, min(y, box[3])) for x, y in curve], colors[i % 6], box))
        place = f'x="{60 + 150 * (i % 4)}" y="{268 + 16 * (i // 4)}" fill="{colors[i % 6]}"'
        legend.append(f"<text {place}>{html.escape(name)}</text>")
    axes = (
        f'<text x="2" y="34">{box[3]:.4g}</text><text x="2" y="230">{box[2]:.4g}</text>'
        f'<text x="60" y="248">{box[0]:.0f}</text><text x="610" y="248">step {box[1]:.0f}</text>'
        '<path d="M60 30V230H660" stroke="#888" fill="none"/>'
    )
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<svg viewBox="0 0 680 300" role="img" aria-label="{html.escape(title)}">{axes}{"".join(lines + legend)}</svg>'
    )


def write_report(folder: Path, settings: TrainSettings) -> Path:
    """`report.html` of a run's folder: curves, the newest sheet of samples, and the settings; no script in it."""
    lines = read_log(folder / "log.jsonl")

    def curve(get: Any) -> list[tuple[float, float]]:
        return [(line["step"], get(line)) for line in lines if get(line) is not None]

    told = curve(lambda line: line.get("told"))
    charts = [
        _chart("Loss", {"all": curve(lambda line: line["loss"])}),
        _chart("Loss by task", {t: curve(lambda line, t=t: line.get("tasks", {}).get(t)) for t in settings.task_list}),
        _chart("Patches that the critic tells apart", {"share": told}) if told else "",
        _chart("Samples a second", {"speed": curve(lambda line: line["samples_per_second"])}),
    ]
    edges = ["-inf", *[f"{b:g}" for b in BINS], "inf"]
    bins = ""
    if lines and "logsnr" in lines[-1]:
        cells = "".join(
            f"<tr><td>{low} to {high}</td><td>{'–' if value is None else value}</td></tr>"
            for low, high, value in zip(edges[:-1], edges[1:], lines[-1]["logsnr"], strict=True)
        )
        bins = f"<h2>Loss by log-SNR, last line</h2><table><tr><th>log-SNR</th><th>loss</th></tr>{cells}</table>"
    unused = ""
    if lines and (lines[-1].get("skipped") or lines[-1].get("gray")):
        unused = (
            f"<p>Since the last start, images that could not be used were drawn {lines[-1]['skipped']} times, gray "
            f"ones where colour is learnt {lines[-1]['gray']} times; others took their place.</p>"
        )
    sheets = sorted((folder / "samples").glob("step-*.png"))
    pictures = "".join(
        f'<h2>Samples, {sheet.stem}</h2><img src="samples/{sheet.name}" alt="source, sample, original by task">'
        for sheet in ([sheets[0], sheets[-1]] if len(sheets) > 1 else sheets)
    )
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in vars(settings).items()
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Training run</title><style>body{font:15px system-ui;max-width:760px;margin:2em auto;padding:0 1em}"
        "svg,img{max-width:100%}svg text{font-size:12px}td,th{padding:2px 12px 2px 0;text-align:left}</style>"
        f"<h1>Training run</h1>{''.join(charts)}{bins}{unused}{pictures}<h2>Settings</h2><table>{rows}</table></html>"
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _of_hub(path: str) -> bool:
    return "/" in path and not os.path.exists(path) and not path.startswith((".", "/", "~"))


def _named(path: str) -> str:
    """A Hub id as it is; of a folder its own name, without where it lies."""
    folder = Path(path).expanduser().resolve()
    run = folder.name == "pipeline" and (folder.parent / "settings.json").is_file()
    return f"`{path if _of_hub(path) else folder.parent.name if run else folder.name}`"


def _origins(settings: TrainSettings) -> list[str]:
    """The pipelines that a run starts from and learns from, each once."""
    return [name for name in dict.fromkeys((settings.init, settings.teacher, settings.guide)) if name]


def licences(settings: TrainSettings) -> str:
    """The LICENSE of what a run starts from and learns from, which goes on to what it makes; empty where there is
    none."""
    from .pipeline import SHIPPED

    texts = []
    for name in _origins(settings):
        if _of_hub(name):
            path = _licence_of_hub(name)
        else:
            path = SHIPPED.get(name, Path(name).expanduser()) / "LICENSE"
        if path is not None and path.is_file():
            texts.append(path.read_text(errors="replace"))
    return "\n\n".join(dict.fromkeys(texts))


def _licence_of_hub(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "LICENSE"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            print(f"warning: whether {name} has a LICENSE can't be known now: {error}", file=sys.stderr)
        return None


def write_card(path: Path, settings: TrainSettings, step: int, parameters: int, licensed: bool = False) -> None:
    """The model card of a run: what was trained, on what, how long; no word of quality that nobody measured.
    licensed: by the LICENSE beside it."""
    from huggingface_hub import ModelCard, ModelCardData

    given, others = split_sources(settings.data), split_sources(settings.crops)
    sources = [_named(path) + (f" (weight {weight:g})" if weight != 1 else "") for path, weight in given]
    crops = [_named(path) for path, _ in others]
    licence: dict[str, Any] = {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="image-to-image", tags=["palette", *settings.task_list],
        datasets=[path for path, _ in [*given, *others] if _of_hub(path)] or None,
        base_model=[name for name in _origins(settings) if _of_hub(name)] or None,
        **(licence if licensed else {}),
    )  # fmt: skip
    kind = "Low-rank adapters, merged" if settings.lora_rank else "All weights"
    origin = f", from {_named(settings.init)}" if settings.init else ""
    facts = {
        "tasks": ", ".join(settings.task_list),
        "trained": f"{kind}{origin}: {step:,} steps of {settings.batch} samples",
        "data": ", ".join(sources),
        "size": f"{settings.size} pixels, {parameters / 1e6:.1f}M parameters",
        "objective": f"{settings.loss}, {'regression' if settings.regression else settings.prediction_type}",
        "optimiser": f"{settings.optimizer}, rate {settings.rate:g}, {settings.schedule}; EMA {settings.ema:g}",
        "precision": settings.precision or "as Accelerate was configured",
    }
    if settings.distils:
        levels = f"{settings.levels} noise levels of each of its pictures"
        facts["teacher"] = f"{_named(settings.teacher)}, {settings.teacher_steps or 'its default'} steps"
        facts["distilled"] = f"for {settings.student_steps} steps, " + (
            "from where the student's own steps lead" if settings.on_policy else levels
        )
    elif settings.teacher:
        facts["teacher"] = f"{_named(settings.teacher)}, its prediction at each noise level"
    if settings.guide:
        between = f"at log-SNR {settings.guided_from:g} to {settings.guided_to:g}"
        facts["guidance"] = f"{settings.guidance:g} of the teacher from {_named(settings.guide)}, {between}"
    if settings.adversarial:
        every = f"; the teacher at each {settings.teacher_every} steps" if settings.teacher_every > 1 else ""
        facts["critic"] = f"weight {settings.adversarial:g}, rate {settings.critic_rate:g}{every}"
    if crops:
        facts["crops"] = f"of {', '.join(crops)}: JPEG restoration's samples, {settings.crop_share:.0%} of other tasks'"
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    use = usage("PATH OR HUB ID", settings.task_list, settings.task_list[0])
    body = f"# Palette model\n\n{text}\n\nIts quality has not been measured here.\n\n{use}\n"
    card = f"---\n{data.to_yaml()}\n---\n\n{body}"
    ModelCard(card).save(path)


def usage(name: str, tasks: list[str], task: str) -> str:
    """How a card says that the model of this name is used with this package."""
    code = (
        "```python\nfrom palette_diffusers import PalettePipeline\n\n"
        f'pipe = PalettePipeline.from_pretrained("{name}")\n{call(task)}\n```'
    )
    own = [
        f"`{each}`" + (f" (class `{type(get_task(each)).__name__}`)" if each in task_names() else "")
        for each in tasks
        if not built_in(each)
    ]
    first = "register it first by `palette_diffusers.register_task`, from the code of the model's author"
    return f"Not built in: {', '.join(own)}; {first}.\n\n{code}" if own else code


def call(task: str) -> str:
    extra = {"inpainting": ', mask_image="mask.png"', "uncropping": ", right=0.25"}.get(task, "")
    return f'pipe("photo.jpg", task="{task}"{extra}).images[0].save("result.png")'


def built_in(task: str) -> bool:
    """Whether this is a task of the package's, and not a user's own."""
    return task in task_names() and type(get_task(task)).__module__ == Task.__module__
