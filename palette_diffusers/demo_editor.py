"""Where masks and colours are painted: Gradio's editor, with an end to what it keeps in memory."""

import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs

LAYERS = 4  # the page has one
STORE = 128_000_000  # bytes of what was painted in one of the page's two editors and waits; the oldest goes first
AGE = 3600  # seconds until it goes in any case


class Store:
    """What an editor was sent and no job has taken: the page sends what is painted before the job that takes it. Gradio
    keeps whatever is sent, without a limit, for anyone, and opens it with every decoder. No subclass of the editor: for
    one, Gradio writes a file beside its code."""

    def __init__(self, editor: gr.ImageEditor):
        self._kept, self._accept = editor.blob_storage, editor.accept_blobs
        self._came: dict[str, float] = {}  # the last one last
        self._lock = Lock()
        editor.accept_blobs = self.accept_blobs  # type: ignore[method-assign]

    def take(self, brush: Mapping[str, Any]) -> list[Any]:
        """The layers of what the page names, as `open_upload` reads them: those that were sent before, or uploads."""
        name = brush.get("id")
        if name is None:
            return list(brush.get("layers") or ())[:LAYERS]
        kept = self._kept.pop(name, None) if isinstance(name, str) else None
        return [] if kept is None else [layer for layer in kept.layers[:LAYERS] if layer]

    @server
    def accept_blobs(self, data: AcceptBlobs) -> None:
        """One picture of a painting: of its layers, the background, or both together.

        Raises:
            gr.Error: what no page of ours sends.
        """
        given: dict[str, Any] = dict(data.data)
        kind, name, index = given.get("type"), str(given.get("id") or ""), str(given.get("index") or "null")
        known = kind in ("layer", "background", "composite") and name and data.files
        if not known or (kind == "layer" and not (index.isdecimal() and int(index) < LAYERS)):
            raise gr.Error("What was painted can't be read: paint it again.")
        with self._lock:
            self._accept(data)
            self._came.pop(name, None)
            self._came[name] = time.monotonic()
            self._forget()

    def forget(self) -> None:
        """What is too old, or too much; what a job has taken is gone already."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._came = {name: since for name, since in self._came.items() if name in self._kept}
        held = {name: self._bytes(name) for name in self._came}
        total = sum(held.values())
        for name, since in list(self._came.items()):
            if total > STORE or time.monotonic() - since > AGE:
                total -= held[name]
                self._kept.pop(name, None)
                del self._came[name]

    def _bytes(self, name: str) -> int:
        kept = self._kept.get(name)  # a job may take it meanwhile
        parts = [] if kept is None else [kept.background, kept.composite, *kept.layers]
        return 1000 + sum(len(part) for part in parts if part)
