"""The demo: one page over the pipeline, and the same tasks as named endpoints for other programs.

`palette demo` starts it; needs the extra `[demo]`. What happens on a click stands in `demo_handlers.py`.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from . import __version__, canvas, sizes
from .demo_batches import Stopped
from .demo_downloads import bound_downloads
from .demo_editor import Store
from .demo_examples import EXAMPLES, GROW, PHOTOGRAPHS, RIGHT, Examples, beside_of
from .demo_files import deleting, own_folder, scratch
from .demo_handlers import (
    ASPECTS,
    BATCH_TASKS,
    MOST_PERCENT,
    SEEDS,
    SHOWN,
    SPEED_NAMES,
    STANDARD,
    Handlers,
    Moment,
    Refused,
    Result,
    Settings,
    pack,
    smaller,
    write,
)
from .demo_jobs import SOLVERS, Step, Waiting, on_zero_gpu
from .demo_limits import SHOWN_BY_BROWSERS, BodyLimit, Failed, Limits, choice, open_upload, stem, whole
from .machine import best_dtype, bound_arenas, bound_caches, chosen_device
from .norms import lay_out
from .pipeline import PalettePipeline
from .tasks import get_task

# the tabs, and what the pipeline calls their tasks
TASKS = {
    "Colorize": "colorization",
    "Inpaint": "inpainting",
    "Uncrop": "uncropping",
    "Restore": "jpeg_restoration",
}
AT_THE_END = (10**7, 10**7)  # seconds; while the server runs, files are deleted by demo_files.py
FRAME = 0.15  # seconds between two previews
EDITOR = 1024  # pixels of the longer side while a mask or colours are painted
# of things that many photographs show; only a stroke's chroma counts
PAINTS: list[str | tuple[str, float]] = [
    "#d9a184", "#7a4f2c", "#5b86c4", "#5f7f3a", "#a8322a", "#d2662d", "#d8b84a", "#c9ad7f", "#243a6e", "#808080",
]  # fmt: skip
OWN = next(iter(ASPECTS))
# on a phone the result stands below the button
SHOW_RESULT = "() => { if (innerWidth < 768) document.querySelector('#status').scrollIntoView({behavior: 'smooth'}) }"
# unless another photo was chosen since: the same value once more would clear what is painted on it
SHOW_PNG = (
    "(photo, unseen, png) => "
    "photo && unseen && photo.path === unseen && png ? (Array.isArray(png) ? png[0] : png) : {__type__: 'update'}"
)
# the tabs were measured before the style sheet came
FIT_TABS = "() => setTimeout(() => dispatchEvent(new Event('resize')), 200)"
CSS = """
.gradio-container {max-width: 1240px !important; width: 100%; margin: auto}
#title p {margin: 0}
.tab-container button {padding: 0 .5rem !important; font-size: .95rem}
@media (max-width: 480px) {.tab-container button {padding: 0 .35rem !important; font-size: .85rem}}
#gallery .grid-wrap {padding-top: 2.5rem; min-height: 0}
#gallery .grid-container {grid: auto-flow auto / repeat(auto-fit, minmax(120px, 1fr))}
#gallery .thumbnail-lg {display: flex; flex-direction: column; aspect-ratio: auto}
#gallery .thumbnail-lg img {height: auto; max-height: 220px; object-fit: contain}
#gallery .caption-label {position: static; max-width: 100%; border: 0; white-space: normal; overflow-wrap: anywhere}
#status {min-height: 2.6rem}
#preview .image-frame, #preview img {width: 100%; height: auto; max-height: 640px; object-fit: contain}
#status progress {width: 100%; height: .5rem; appearance: none; border: 0; background: var(--border-color-primary)}
#status progress::-webkit-progress-bar {background: var(--border-color-primary)}
#status progress::-webkit-progress-value {background: var(--color-accent)}
#status progress::-moz-progress-bar {background: var(--color-accent)}
"""


def _status(text: str, done: float | None = None) -> str:
    bar = "" if done is None else f'<progress value="{done:.3f}" max="1" aria-label="progress"></progress>'
    return f'<div role="status" aria-live="polite">{escape(text)}{bar}</div>'


def _step(step: Step, number: int, total: int) -> str:
    parts = [f"Picture {number} of {total}"] if total > 1 else []
    parts += [f"level {step.level}"] if step.level > 1 else []
    parts += [f"step {step.number} of {step.of}"]
    parts += [f"{step.seconds:.0f} s left"] if step.seconds >= 1 else []
    text = ", ".join(parts)
    return _status(text[0].upper() + text[1:], (number - 1 + step.number / step.of) / total)


class Page:
    """The components and what connects them."""

    def __init__(self, handlers: Handlers):
        self.handlers, self.limits = handlers, handlers.limits
        self.compute: dict[str, Any] = dict(
            concurrency_id="pipeline", concurrency_limit=self.limits.max_jobs if handlers.shared else 1
        )
        self.default_steps = min(handlers.pipe.config.default_steps, self.limits.max_steps)
        self.examples = Examples(handlers, self.default_steps)
        self.looking = BoundedSemaphore(self.limits.max_jobs)  # photographs that are decoded to be painted on
        with gr.Blocks(
            title="Palette: mend photographs", analytics_enabled=False, delete_cache=AT_THE_END
        ) as self.blocks:
            gr.Markdown("# Palette\nColour, repair, extend and clean your photographs.", elem_id="title")
            with gr.Row():
                with gr.Column(min_width=340):
                    self._inputs()
                with gr.Column(min_width=340):
                    self._outputs()
            self._connect()
            self._endpoints()

    # components

    def _inputs(self) -> None:
        photo: dict[str, Any] = dict(type="filepath", image_mode=None, sources=["upload", "clipboard"], format="png")
        editor: dict[str, Any] = dict(type="pil", format="png", sources=(), transforms=(), layers=False, height=460)
        self.photo = gr.Image(label="Your photo", elem_id="photo", height=300, **photo)
        self.facts = gr.Markdown("", elem_id="facts")
        self.run: dict[str, gr.Button] = {}
        self.tries: dict[str, Any] = {}
        with gr.Tabs():
            with gr.Tab("Colorize"):
                gr.Markdown("Colour for a black-and-white photo. You know what colour something has? Tell it.")
                with gr.Accordion("Paint colours", open=False, elem_id="paint"):
                    gr.Markdown("A short stroke on each thing is enough: its colour goes as far as the thing does.")
                    self.strokes = gr.ImageEditor(
                        label="Paint here", elem_id="strokes",
                        brush=gr.Brush(colors=PAINTS, default_color=PAINTS[0], default_size=14), **editor,
                    )  # fmt: skip
                    with gr.Accordion("Upload strokes instead (transparent elsewhere)", open=False):
                        self.hints = gr.Image(label="Strokes", elem_id="hints", height=200, **photo)
                self._finish("Colorize", beside=self.hints)
            with gr.Tab("Inpaint"):
                gr.Markdown("Paint over what should go.")
                self.editor = gr.ImageEditor(
                    label="Paint here", elem_id="editor",
                    brush=gr.Brush(colors=[("#ff2d78", 0.6)], color_mode="fixed", default_size=32), **editor,
                )  # fmt: skip
                with gr.Row():
                    self.invert = gr.Checkbox(label="Keep only what is painted")
                    self.grow = gr.Slider(0, 64, GROW, step=1, label="Grow the mask (pixels)")
                with gr.Accordion("Upload a mask instead", open=False):
                    self.mask = gr.Image(label="Mask: white = fill in", height=200, **photo)
                self._finish("Inpaint", beside=self.mask)
            with gr.Tab("Uncrop"):
                gr.Markdown("More picture beyond the border.")
                self.aspect = gr.Radio(list(ASPECTS), value=OWN, label="Shape")
                with gr.Row():
                    self.left, self.right = (
                        gr.Slider(0, MOST_PERCENT, value, step=0.01, label=f"{side} (%)", min_width=130)
                        for side, value in (("Left", 0), ("Right", RIGHT))
                    )
                    self.top, self.bottom = (
                        gr.Slider(0, MOST_PERCENT, 0, step=0.01, label=f"{side} (%)", min_width=130)
                        for side in ("Top", "Bottom")
                    )
                self.trim = gr.Checkbox(label="Make lines along the edges anew, as scans have them")
                self._finish("Uncrop")
            with gr.Tab("Restore"):
                gr.Markdown("Takes blocks and noise out of a strongly compressed photo.")
                self.quality = gr.Textbox("Choose a photo", label="JPEG quality found", interactive=False)
                self._finish("Restore")
            with gr.Tab("Batch"):
                gr.Markdown(f"Up to {self.limits.max_files} photos at once; a zip comes back.")
                self.files = gr.File(
                    label="Photos", file_count="multiple", file_types=["image"], type="filepath", elem_id="files"
                )
                self.batch_task = gr.Radio(list(BATCH_TASKS), value="Colorize", label="Task")
                self.run["Batch"] = gr.Button("Run all", variant="primary")
        self.speed = gr.Radio(
            list(SPEED_NAMES), value=STANDARD, label="Speed", elem_id="speed",
            info="Fast, Balanced and Best choose steps and solver themselves.",
        )  # fmt: skip
        self.samples = gr.Slider(1, self.limits.max_samples, 1, step=1, label="Variations")
        with gr.Accordion("Advanced", open=False):
            self.anew = gr.Checkbox(True, label="Another seed each time")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS)
            self.steps = gr.Slider(1, self.limits.max_steps, self.default_steps, step=1, label="Steps")
            self.solver = gr.Dropdown(list(SOLVERS), value=next(iter(SOLVERS)), label="Solver")
        limits = self.limits
        gr.Markdown(
            f"Up to {limits.max_pixels / 1e6:g} megapixels and {limits.max_bytes / 1e6:g} MB a photo. "
            f"Files are deleted after {limits.keep_seconds / 60:g} minutes."
        )

    def _finish(self, tab: str, beside: gr.Image | None = None) -> None:
        """The button of a tab, and photographs to try it on, with what belongs beside them: a mask, or strokes."""
        self.run[tab] = gr.Button(tab, variant="primary")
        inputs = [self.photo] if beside is None else [self.photo, beside]
        photos = [PHOTOGRAPHS / name for name in EXAMPLES[TASKS[tab]]]
        rows = [[path and str(path) for path in (photo, beside_of(photo))[: len(inputs)]] for photo in photos]
        self.tries[tab] = gr.Examples(rows, inputs, label="Or try one of these")

    def _outputs(self) -> None:
        self.status = gr.HTML(_status("Choose a photo, then press the button."), elem_id="status")
        self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        self.preview = gr.Image(
            label="Preview", format="png", interactive=False, visible=False, elem_id="preview", buttons=[]
        )
        self.slider = gr.ImageSlider(
            label="Before / after", format="png", interactive=False, elem_id="result", buttons=["fullscreen"],
            max_height=640,
        )  # fmt: skip
        self.gallery = gr.Gallery(
            label="Pick one", visible=False, columns=4, height="auto", object_fit="contain", allow_preview=False,
            format="png", interactive=False, elem_id="gallery", buttons=[],
        )  # fmt: skip
        with gr.Row():
            self.download = gr.DownloadButton("Download PNG", interactive=False, elem_id="download")
            self.go_on = gr.Button("Use as photo", interactive=False, elem_id="go-on")
        self.zip = gr.DownloadButton("Download all (zip)", visible=False, elem_id="zip")
        self.full = gr.File(visible="hidden", file_count="multiple", type="filepath")
        self.pairs = gr.File(visible="hidden", file_count="multiple", type="filepath")
        self.unseen = gr.Textbox(visible="hidden")  # the photo that a browser can't show, and a PNG of it
        self.seen = gr.File(visible="hidden", type="filepath")

    # connections

    def _connect(self) -> None:
        self.blocks.load(None, js=FIT_TABS)
        handlers = self.handlers
        private: dict[str, Any] = dict(api_visibility="private")
        self.stores = [Store(self.editor), Store(self.strokes)]
        handlers.read_mask, handlers.read_strokes = (store.take for store in self.stores)
        settings = [self.seed, self.anew, self.samples, self.steps, self.solver, self.speed]
        sides = [self.left, self.right, self.top, self.bottom]
        beside = [self.mask, self.hints]  # they belong to one photo, and go with it
        jobs: dict[str, tuple[Callable, list]] = {
            "Colorize": (self._colorize, [self.strokes, self.hints]),
            "Inpaint": (self._inpaint, [self.editor, self.mask, self.invert, self.grow]),
            "Uncrop": (self._uncrop, [*sides, self.trim]),
            "Restore": (self._restore, []),
            "Batch": (self._batch, [self.files, self.batch_task]),
        }
        options: dict[str, Any] = dict(
            preprocess=False, show_progress="minimal", show_progress_on=self.status, **private, **self.compute
        )
        runs: list[Any] = []
        for tab, (function, inputs) in jobs.items():
            photo = [] if tab == "Batch" else [self.photo]
            runs.append(self.run[tab].click(function, [*settings, *photo, *inputs], self._shown(), **options))
            self.run[tab].click(None, js=SHOW_RESULT)
        for tab, tries in self.tries.items():
            others = [each for each in beside if each not in tries.inputs]
            cleared = tries.load_input_event.then(
                lambda others=others: dict.fromkeys(others), None, others, queue=False, show_progress="hidden",
                **private,
            )  # fmt: skip
            runs.append(cleared.then(self._example(tab), tries.dataset, self._shown(), **options))
            tries.dataset.click(None, js=SHOW_RESULT)
        for run in runs:
            run.then(self._idle, None, self.stop, queue=False, show_progress="hidden", **private)
        self.stop.click(self._stop, None, None, queue=False, show_progress="hidden", **private)
        chosen = self.photo.change(
            self._photo,
            self.photo,
            about := [self.facts, self.quality, self.editor, self.strokes, self.aspect],
            preprocess=False,
            show_progress="hidden",
            **private,
        )
        chosen.failure(
            self._photo_again, self.photo, [self.photo, *about], preprocess=False, queue=False, show_progress="hidden",
            **private,
        )  # fmt: skip
        made = self.photo.upload(
            self._as_png, self.photo, [self.unseen, self.seen], preprocess=False, show_progress="hidden",
            trigger_mode="multiple", **private,
        )  # fmt: skip
        made.then(None, [self.photo, self.unseen, self.seen], self.photo, js=SHOW_PNG, **private)
        self.aspect.input(self._aspect, [self.photo, self.aspect], sides, preprocess=False, queue=False, **private)
        gr.on([side.input for side in sides], lambda: OWN, None, self.aspect, queue=False, **private)
        gr.on(
            [self.photo.upload, self.photo.clear], lambda: dict.fromkeys(beside), None, beside, queue=False, **private
        )
        gr.on([self.steps.input, self.solver.input], None, None, self.speed, js=f"() => '{STANDARD}'", **private)
        self.gallery.select(
            self._pick, [self.full, self.pairs], [self.slider, self.download], queue=False, show_progress="hidden",
            **private,
        )  # fmt: skip
        self.go_on.click(
            lambda path: {self.photo: path} | dict.fromkeys(beside), self.download, [self.photo, *beside],
            queue=False, show_progress="hidden", **private,
        )  # fmt: skip

    def _shown(self) -> list:
        return [
            self.status, self.stop, self.preview, self.slider, self.gallery, self.download, self.go_on, self.zip,
            self.full, self.pairs, self.seed,
        ]  # fmt: skip

    def _photo(self, payload: Any) -> tuple[str, str, Any, Any, str]:
        """A photo was chosen => its facts, its JPEG quality, and copies of it to paint on: for colours a gray one."""
        if not payload:
            return "", "Choose a photo", None, None, OWN
        image = open_upload(payload, self.limits)
        quality = canvas.jpeg_quality(image)
        with self.looking:
            picture = self.handlers.photo(payload)
            height, width = picture.size
            lined = any(canvas.line_at(picture.image, side) for side in ("left", "right", "top", "bottom"))
            small = smaller(canvas.to_pil(picture.image), EDITOR)
        facts = f"{width}x{height}" + ("" if quality is None else f", JPEG of quality {quality}")
        facts += ", with a line along an edge, which Uncrop can make anew" if lined else ""
        found = f"{image.format}, no JPEG" if quality is None else f"{quality} of 100"
        empty: dict[str, Any] = {"layers": [], "composite": None}
        return facts, found, empty | {"background": small}, empty | {"background": small.convert("L")}, OWN

    def _photo_again(self, payload: Any) -> tuple:
        """Without the queue, which may have been full; a photo that is refused goes."""
        try:
            return gr.skip(), *self._photo(payload)
        except Failed:
            return None, *self._photo(None)

    def _as_png(self, payload: Any) -> Iterator[Any]:
        """A photo that browsers show as a broken picture (HEIC, TIFF) => its path, and a PNG of it, upright."""
        try:
            if not payload or open_upload(payload, self.limits).format in SHOWN_BY_BROWSERS:
                yield None, None
                return
            with self.looking:
                picture = self.handlers.photo(payload)
                png = canvas.to_pil(picture.image, picture)
            with scratch() as folder:
                path = write(png, Path(folder) / f"{stem(payload)}.png")
                fits = Path(path).stat().st_size <= self.limits.max_bytes
                yield (payload.get("path"), path) if fits else (None, None)
        except Failed:  # `_photo` says why
            yield None, None

    def forget(self) -> None:
        """What was painted and never taken."""
        for store in self.stores:
            store.forget()

    def _aspect(self, payload: Any, name: Any) -> list:
        aspect = choice("shape", name, ASPECTS)
        if not aspect or not payload:
            return [gr.skip()] * 4
        with self.looking:
            height, width = self.handlers.photo(payload).size
        try:
            pixels = sizes.sides_for((height, width), aspect)
        except ValueError:  # it has that shape already
            return [0.0] * 4
        wholes = {"left": width, "right": width, "top": height, "bottom": height}
        percent = [round(100 * pixels[side] / whole, 2) for side, whole in wholes.items()]
        if max(percent) > MOST_PERCENT:
            gr.Warning(f"{name} adds {max(percent):.0f}% to a side, the limit is {MOST_PERCENT}%: extend it twice.")
            return [gr.skip()] * 4
        return percent

    def _pick(self, full: Any, pairs: Any, event: gr.SelectData) -> tuple:
        i = event.index
        return (pairs[2 * i], pairs[2 * i + 1]), full[i]

    def _stop(self, request: gr.Request) -> None:
        self.handlers.stops.stop(request.session_hash or "")

    def _idle(self, request: gr.Request) -> Any:
        """The button to stop goes, unless another job of the visitor is at work."""
        return gr.update(visible=self.handlers.stops.busy(request.session_hash or ""))

    # the five tabs

    def _colorize(self, request: gr.Request, *values: Any) -> Iterator[dict]:
        *settings, payload, brush, upload = values
        picture = self.handlers.photo(payload)
        options = self.handlers.hints(picture, brush, upload)
        yield from self._mend("colorization", settings, payload, request, picture, **options)

    def _restore(self, request: gr.Request, *values: Any) -> Iterator[dict]:
        *settings, payload = values
        yield from self._mend("jpeg_restoration", settings, payload, request)

    def _inpaint(self, request: gr.Request, *values: Any) -> Iterator[dict]:
        *settings, payload, brush, upload, invert, pixels = values
        picture = self.handlers.photo(payload)
        mask = self.handlers.mask(picture, brush, upload, invert, pixels)
        yield from self._mend("inpainting", settings, payload, request, picture, mask_image=mask)

    def _uncrop(self, request: gr.Request, *values: Any) -> Iterator[dict]:
        *settings, payload, left, right, top, bottom, trim = values
        picture = self.handlers.photo(payload)
        sides = self.handlers.sides(picture, left, right, top, bottom)
        yield from self._mend("uncropping", settings, payload, request, picture, trim=trim is True, **sides)

    def _mend(
        self, task: str, values: list, payload: Any, request: gr.Request, picture: canvas.Picture | None = None,
        **options: Any,
    ) -> Iterator[dict]:  # fmt: skip
        settings = Settings.checked(self.limits, *values)
        picture = picture or self.handlers.photo(payload)
        moments = self.handlers.moments(task, payload, picture, settings, request.session_hash or "", **options)
        yield from self._follow(moments, settings.samples, settings.seed, request)

    def _example(self, tab: str) -> Callable[[gr.Request, Any], Iterator[dict]]:
        task, examples = TASKS[tab], self.examples

        def example(request: gr.Request, number: Any) -> Iterator[dict]:
            number = whole("example", number, 0, len(EXAMPLES[task]) - 1)
            kept = (task, number) in examples.kept
            moments = examples.moments(task, number, request.session_hash or "")
            yield from self._follow(moments, 1, examples.settings.seed, request, kept=kept)

        return example

    def _batch(self, request: gr.Request, *values: Any) -> Iterator[dict]:
        *checked, files, task = values
        settings = Settings.checked(self.limits, *checked)
        payloads = [files] if isinstance(files, dict) else files or []
        if not payloads:
            raise gr.Error("Choose photos first.")
        if len(payloads) > self.limits.max_files:
            raise gr.Error(f"{len(payloads)} photos came, the limit is {self.limits.max_files} at once.")
        name, session = choice("task", task, BATCH_TASKS), request.session_hash or ""
        moments = self.handlers.batch(name, payloads, settings, session)
        yield from self._follow(moments, len(payloads) * settings.samples, settings.seed, request, batch=True)

    def _follow(
        self, moments: Iterator[Moment], total: int, seed: int, request: gr.Request, batch: bool = False,
        kept: bool = False,
    ) -> Iterator[dict]:  # fmt: skip
        """What the page shows while the work goes on, and at its end; one work a visitor, since all show the same."""
        stops, session = self.handlers.stops, request.session_hash or ""
        place = stops.take_place(session)
        if place is None:
            gr.Warning("Your last task is still at work: wait for it, or press Stop first.")
            yield {self.seed: gr.skip()}
            return
        try:
            yield from self._show(moments, total, seed, request, batch, kept)
        finally:
            stops.leave_place(session, place)

    def _show(
        self, moments: Iterator[Moment], total: int, seed: int, request: gr.Request, batch: bool, kept: bool
    ) -> Iterator[dict]:
        refused: list[Refused] = []
        full: list[str] = []
        pairs: list[str] = []
        captions: list[str] = []
        begun, last = time.monotonic(), 0.0
        yield {
            self.status: _status("Starting ..."),
            self.stop: gr.update(visible=True),
            self.preview: gr.update(visible=False, value=None),
            self.seed: seed,
        }
        with scratch() as name:
            folder = Path(name)
            try:
                for moment in moments:
                    if isinstance(moment, Result):
                        self._keep(moment, folder / str(len(full)), full, pairs)
                        photo = moment.name.rpartition("-")[0]
                        captions.append(f"{photo}, {moment.caption}" if batch else moment.caption)
                    elif isinstance(moment, Refused):
                        refused.append(moment)
                    elif isinstance(moment, Waiting):
                        yield {self.status: _status("Waiting for other visitors' photos ...")}
                    elif time.monotonic() - last > FRAME:
                        last = time.monotonic()
                        yield {
                            self.status: _step(moment, len(full) + 1, total),
                            self.preview: gr.update(visible=True, value=moment.picture),
                            self.slider: gr.update(visible=False),
                        }
                text = "Made before and kept." if kept else f"Done in {time.monotonic() - begun:.1f} s."
                text += f" Seed {seed}."
            except (Stopped, gr.Error) as error:  # a message in a corner would go, and the bar stay
                text = "Stopped." if isinstance(error, Stopped) else error.message
            if len(full) < total and (full or refused):
                text += f" {len(full)} of {total} pictures are ready."
            text += "".join(f" {each.name}: {each.reason}" for each in refused)
            if not full:
                yield {self.status: _status(text), self.stop: self._idle(request)}
                return
            thumbnails, archive = list(zip(pairs[1::2], captions, strict=True)), None
            if batch:
                try:
                    archive = pack(full, folder)
                except Failed as error:  # the pictures are there
                    text = error.message
            yield {
                self.status: _status(text),
                self.stop: self._idle(request),
                self.preview: gr.update(visible=False, value=None),
                self.slider: gr.update(visible=True, value=(pairs[0], pairs[1])),
                self.gallery: gr.update(visible=len(full) > 1, value=thumbnails, selected_index=0),
                self.download: gr.update(interactive=True, value=full[0]),
                self.go_on: gr.update(interactive=True),
                self.zip: gr.update(visible=batch, value=archive),
                self.full: full,
                self.pairs: pairs,
            }

    def _keep(self, result: Result, folder: Path, full: list[str], pairs: list[str]) -> None:
        before = write(smaller(result.before), folder / "before.png")
        after = write(result.after, folder / f"{result.name}.png")
        shown = write(smaller(result.after), folder / "after.png") if max(result.after.size) > SHOWN else after
        full.append(after)
        pairs.extend((before, shown))

    # for programs

    def _endpoints(self) -> None:
        handlers, default = self.handlers, self.default_steps
        with gr.Row(visible=False):
            image, mask, hints = (
                gr.Image(label=x, type="filepath", image_mode=None) for x in ("image", "mask", "hints")
            )
            sides = [gr.Number(0, label=side, precision=None) for side in ("left", "right", "top", "bottom")]
            seed, steps = gr.Number(0, label="seed"), gr.Number(default, label="steps")
            speed = gr.Radio(list(SPEED_NAMES), value=STANDARD, label="speed")
            result = gr.Image(label="result", type="filepath", format="png")
            state = gr.JSON(label="health")
        tail = [seed, steps, speed]
        for function, inputs in (
            (handlers.colorize, [image, *tail]),
            (handlers.colorize_with_hints, [image, hints, *tail]),
            (handlers.inpaint, [image, mask, *tail]),
            (handlers.uncrop, [image, *sides, *tail, gr.Checkbox(label="trim")]),
            (handlers.restore_jpeg, [image, *tail]),
        ):
            gr.Button(visible=False).click(
                function, inputs, result, api_name=function.__name__, preprocess=False, **self.compute
            )
        gr.Button(visible=False).click(self.health, None, state, api_name="health", queue=False)

    def health(self) -> dict[str, Any]:
        """Whether the server works (else why not), on which tasks, and how many jobs wait."""
        return {
            "status": "unwell" if self.handlers.unwell else "ok",
            "reason": self.handlers.unwell,
            "version": __version__,
            "tasks": list(self.handlers.pipe.config.tasks),
            "waiting": len(self.blocks._queue),
        }


def load(model: str | None = None, device: str = "auto") -> tuple[PalettePipeline, PalettePipeline | None]:
    """The pipeline on the fastest device, warm: a folder, a Hub id, or None for the starter checkpoint; and its student
    for few steps, if it names one."""
    bound_caches()
    bound_arenas()
    if on_zero_gpu():  # what `spaces` makes of CUDA there holds for this thread alone
        return _warm(model, chosen_device(device))
    with ThreadPoolExecutor(1) as other:  # whose team of threads goes with it (`machine.without_team`)
        return other.submit(_warm, model, chosen_device(device)).result()


def _warm(model: str | None, device: str) -> tuple[PalettePipeline, PalettePipeline | None]:
    pipe = PalettePipeline.from_pretrained(model, dtype=best_dtype(device)).to(device)
    lay_out(pipe.unet, device)
    pipe.set_progress_bar_config(disable=True)
    try:
        few = pipe.load_student()
    except (OSError, ValueError) as error:  # every other speed works
        logging.getLogger(__name__).warning("without a student for few steps: %s", error)
        few = None
    if on_zero_gpu():  # there is none yet
        return pipe, few
    task = get_task(pipe.config.default_task)
    needed: dict[str, Any] = {"mask_image": "8,8,24,24"} if task.takes_mask else {}
    if task.name == "uncropping":
        needed = {"right": 8}
    pipe(Image.new("RGB", (64, 64)), num_inference_steps=1, **needed)
    return pipe, few


def launch(
    model: str | None = None, host: str | None = None, port: int | None = None, device: str = "auto",
    mcp: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Starts the demo, its files in a folder of their own (`demo_files`). The model is `PALETTE_MODEL` unless one is
    named; `PALETTE_LOGIN=user:password` asks for a login; limits come from the environment (`Limits`)."""
    limits = Limits.from_environment()
    login = os.environ.get("PALETTE_LOGIN", "")
    user, _, password = login.partition(":")
    if login and not (user and password):
        raise ValueError(f"PALETTE_LOGIN has no {'password' if user else 'user'}, expected user:password")
    folder = own_folder()
    bound_downloads(limits)
    pipe, few = load(model or os.environ.get("PALETTE_MODEL"), device)
    page = Page(Handlers(pipe, limits, few))
    Image.MAX_IMAGE_PIXELS = limits.max_pixels

    async def health(request: Request) -> JSONResponse:
        return JSONResponse(page.health(), 503 if page.handlers.unwell else 200)

    page.blocks.queue(max_size=limits.max_queue, default_concurrency_limit=8, api_open=False)
    return page.blocks.launch(
        server_name=host,
        server_port=port,
        auth=(user, password) if user else None,
        max_file_size=limits.max_bytes,
        state_session_capacity=limits.max_visitors,
        mcp_server=mcp or None,  # GRADIO_MCP_SERVER counts then
        css=CSS,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=["api"],
        show_error=False,
        ssr_mode=False,
        app_kwargs={
            "lifespan": deleting(folder, page.blocks, limits.keep_seconds, page.forget),
            "routes": [Route("/health", health)],
            "middleware": [Middleware(BodyLimit, max_bytes=limits.max_files * limits.max_bytes + 1_000_000)],
        },
        **options,
    )
