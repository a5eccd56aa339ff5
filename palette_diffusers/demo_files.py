"""Temporary files of the demo: in a folder of its own, deleted when they are old. Gradio's own task for it ends, in
silence, at the first file that a visitor adds while it looks; it only deletes what is left at the server's end."""

import asyncio
import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Seen = dict[tuple[str, int], float]  # what was there, as it was written => when that was seen first, by a steady clock
PREFIX, LOCK = "palette-demo-", ".palette-demo-server"
_own: list[tuple[Path, FileLock]] = []  # as long as the process lives: for visitors' files, and work that goes on


def own_folder() -> Path:
    """What visitors send is kept in a folder that only this process' user may read, in `GRADIO_TEMP_DIR` where it is
    set; it is removed with the process, and what one that was killed left is removed by the next. Gradio's default,
    /tmp/gradio, is the first user's on a machine: the next one's uploads fail. To be called before gradio is imported.
    """
    if not _own:
        system = Path(tempfile.gettempdir()).resolve()
        parent = Path(os.environ.get("GRADIO_TEMP_DIR") or system).resolve()
        parent.mkdir(parents=True, exist_ok=True)
        for left in [path for place in {parent, system} for path in place.glob(f"{PREFIX}*")]:
            _remove_abandoned(left)
        for place in (parent, system):  # results are made beside: what lies among the visitors' files, Gradio serves
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            lock = FileLock(folder / LOCK)
            lock.acquire()
            _own.append((folder, lock))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = str(_own[0][0])
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the folders go, too
    return _own[0][0]


def scratch() -> tempfile.TemporaryDirectory:
    """A folder for a job's results until Gradio has taken them; with `own_folder`, what a kill leaves goes, too."""
    return tempfile.TemporaryDirectory(dir=_own[1][0] if _own else None)


def _remove_abandoned(folder: Path) -> None:
    """Of a server that was killed: nobody holds its lock."""
    with suppress(Timeout, OSError):
        ours = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
        if ours and not folder.is_symlink() and (folder / LOCK).is_file():
            with FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def delete_old(folder: Path, blocks: Any, seen: Seen, age: float) -> Seen:
    """Of the files that this `gr.Blocks` made, and what broken uploads left in the folder, what was `seen` first, as it
    is, more than `age` seconds ago; its components' own stay. Empty folders go, too. Returns what is seen now."""
    own = set().union(*(getattr(block, "keep_in_cache", ()) for block in blocks.blocks.values()))
    made = set().union(*(list(files) for files in blocks.temp_file_sets))  # a list is copied at once
    below: list[Path] = []
    with suppress(OSError):  # what went while it was listed: the next time
        below.extend(folder.rglob("*"))
    left_over = [path for path in below if path.suffix == ".part" or (path.parent == folder and path.name[:3] == "tmp")]
    found = {str(path) for path in [*left_over, *(path for path in below if path.is_dir())]}
    now, left = time.monotonic(), {}
    for name in sorted((found | made) - own, reverse=True):  # what a folder holds comes before it
        path = Path(name)
        with suppress(OSError):  # gone already, or a folder that is not empty
            written = name, path.stat().st_mtime_ns
            since = seen.get(written, now)
            left[written] = since
            if now - since > age:
                path.rmdir() if path.is_dir() else path.unlink()
                del left[written]
    for files in blocks.temp_file_sets:
        for name in list(files):
            if name not in own and not Path(name).exists():
                files.discard(name)
    return left


def deleting(
    folder: Path, blocks: Any, age: float, forget: Callable[[], None]
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A lifespan for the server: looks twice in `age` seconds, every five minutes at least, and calls `forget`."""

    async def look() -> None:
        seen: Seen = {}
        while True:
            await asyncio.sleep(min(600, age) / 2)
            seen = await asyncio.to_thread(delete_old, folder, blocks, seen, age)
            forget()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(look())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
