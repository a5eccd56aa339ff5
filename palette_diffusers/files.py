"""Files and folders that are there whole or not at all: written beside, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that no half-written file stays behind."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, newline="")
    os.replace(part, path)


def occupied(folder: Path) -> bool:
    """Whether something is there already: a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextmanager
def alone(folder: Path, process: int = 0, other: str = "another run is at work") -> Iterator[None]:
    """One run at a time works in a folder; `process` is its number where several share the work. A kill lets go.
    `other` is what the second is told.

    Raises:
        FileExistsError: another run is at work there.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / (f".lock-{process}" if process else ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"{other} in {folder}: wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside `folder`, whose name it takes at the end; where that is not reached, it is removed."""
    folder = folder.resolve()  # "." and a link are none that can be replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".palette-", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if folder == Path.cwd():  # whose shell would stay in what was replaced
            for path in part.iterdir():
                os.replace(path, folder / path.name)
        else:
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
