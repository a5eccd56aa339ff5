"""Temporary files of the demo: in a folder of its own, deleted when they are old. Gradio's own task for it ends, in
silence, at the first file that a visitor adds while it looks; it only deletes what is left at the server's end."""

import asyncio
import atexit
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

Seen = dict[tuple[str, int], float]  # a file as it was written => when that was seen first, by a clock that nobody sets


def own_folder() -> None:
    """What visitors send is kept in a folder that only this process' user may read, removed with the process unless it
    is killed. Gradio's default, /tmp/gradio, is the first user's on a machine: the next one's uploads fail.
    `GRADIO_TEMP_DIR` stays where it is set."""
    if os.environ.get("GRADIO_TEMP_DIR"):
        return
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="palette-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def delete_old(blocks: Any, seen: Seen, age: float) -> Seen:
    """Of the files that this `gr.Blocks` made, those that were `seen` first, as they are, more than `age` seconds ago;
    its components' own stay. Returns what is seen now."""
    own = set().union(*(getattr(block, "keep_in_cache", ()) for block in blocks.blocks.values()))
    now, left = time.monotonic(), {}
    for files in blocks.temp_file_sets:
        for name in set(list(files)) - own:  # a list is copied at once, whoever adds to the set
            path = Path(name)
            with suppress(FileNotFoundError):
                written = name, path.stat().st_mtime_ns
                since = seen.get(written, now)
                if now - since <= age:
                    left[written] = since
                    continue
                path.unlink()
            files.discard(name)
    return left


def deleting(blocks: Any, age: float) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A lifespan for the server: looks twice in `age` seconds, every five minutes at least."""

    async def look() -> None:
        seen: Seen = {}
        while True:
            await asyncio.sleep(min(600, age) / 2)
            seen = await asyncio.to_thread(delete_old, blocks, seen, age)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(look())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
