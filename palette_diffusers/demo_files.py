"""Temporary files of the demo, deleted when they are old. Gradio's own task for it ends, in silence, at the first file
that a visitor adds while it looks; it only deletes what is left at the server's end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any


def delete_old(blocks: Any, age: float) -> None:
    """Of the files that this `gr.Blocks` made, those older than `age` seconds; its components' own stay."""
    own = set().union(*(getattr(block, "keep_in_cache", ()) for block in blocks.blocks.values()))
    for files in blocks.temp_file_sets:
        for name in set(list(files)) - own:  # a list is copied at once, whoever adds to the set
            path = Path(name)
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_ctime <= age:
                    continue
                path.unlink()
            files.discard(name)


def deleting(blocks: Any, age: float) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A lifespan for the server: looks every `age` seconds, every ten minutes at least."""

    async def look() -> None:
        while True:
            await asyncio.sleep(min(600, age))
            await asyncio.to_thread(delete_old, blocks, age)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(look())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
