"""Many files: a folder of photographs => a folder of mended ones.

A run can be killed at any moment and started again: a result appears under its name only when it is whole, and what
is there already is passed over. A file that can't be read is reported at the end, and stops nothing.
"""

import errno
import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from . import canvas
from .canvas import SUFFIXES, Picture
from .machine import without_team

AHEAD, AHEAD_PIXELS = 32, 32_000_000  # photographs that are decoded before the model sees them


@dataclass(frozen=True)
class Job:
    """One photograph, where its result goes, and its mask where the task takes one; or why it can't be done."""

    source: Path
    target: Path
    mask: Path | str | None = None
    problem: str = ""


@dataclass
class Report:
    """What became of a folder; `failed` has the file and the reason."""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


# photographs, their jobs and masks => the results, one each
Restore = Callable[[list[Job], list[Picture], list[torch.Tensor] | None], list[Image.Image]]


def plan(source: Path, output: Path, recursive: bool = False, masks: Path | str | None = None) -> list[Job]:
    """The photographs of a folder, sorted => jobs that keep names and folders, as PNG.

    Args:
        recursive: folders within it, too.
        masks: a folder that has a mask of the same name (any suffix) for each, or one mask for all
            (`canvas.mask_for`).

    A photograph without its mask, or whose result another one writes, is a job with a `problem`. What macOS keeps
    beside files of other systems (`._NAME`) is none.

    Raises:
        NotADirectoryError: source is no folder.
        ValueError: no photographs, an output that the next run would read, a result in the place of a photograph or
            mask.

    >>> plan(Path("README.md"), Path("out"))
    Traceback (most recent call last):
    NotADirectoryError: README.md is no folder
    """
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder")
    inside = output.resolve().is_relative_to(source.resolve())
    if output.resolve() == source.resolve() or (recursive and inside):
        raise ValueError(f"output {output} lies in {source}: its pictures would be taken for photographs")
    there = sorted(p for p in source.glob("**/*" if recursive else "*") if p.suffix.lower() in SUFFIXES and p.is_file())
    found = [path for path in there if not path.name.startswith("._")]
    if not found:
        more = "" if recursive else " (--recursive looks into its folders)"
        raise ValueError(f"{source} has no photographs ({', '.join(SUFFIXES)}){more}")
    jobs: list[Job] = []
    first: dict[Path, Path] = {}
    for path in found:
        target = (output / path.relative_to(source)).with_suffix(".png")
        if first.setdefault(target, path) != path:
            jobs.append(Job(path, target, problem=f"{first[target]} and {path} would both write {target}"))
            continue
        try:
            jobs.append(Job(path, target, _mask_of(path.relative_to(source), masks)))
        except FileNotFoundError as error:
            jobs.append(Job(path, target, problem=str(error)))
    given = {job.source.resolve() for job in jobs}
    hidden = {Path(job.mask).resolve() for job in jobs if isinstance(job.mask, Path)}
    for what, files in (("a photograph", given), ("a mask", hidden)):
        lost = [job.target for job in jobs if job.target.resolve() in files]
        if lost:
            raise ValueError(f"{lost[0]} is {what}, and a result would take its place: name another output")
    if given & hidden:
        raise ValueError(f"{masks} has the photographs themselves, expected a folder of their masks")
    return jobs


def _mask_of(name: Path, masks: Path | str | None) -> Path | str | None:
    if masks is None or not Path(masks).is_dir():
        return masks
    pattern = glob.escape(str(masks / name.with_suffix(""))) + ".*"
    those = sorted(map(Path, glob.glob(pattern)))
    found = [path for path in those if path.suffix.lower() in SUFFIXES and path.stem == name.stem]
    if not found:
        raise FileNotFoundError(f"{masks} has no mask for {name}: {name.stem}.png was expected")
    return found[0]


def _read(job: Job, max_pixels: int) -> tuple[Picture, torch.Tensor | None]:
    picture = canvas.read(job.source, max_pixels)
    return (picture, None) if job.mask is None else canvas.with_mask(picture, job.mask)


def _write(image: Image.Image, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for part in target.parent.glob(f"{glob.escape(canvas.part_name(target))}*.part"):  # left by a kill
        part.unlink(missing_ok=True)
    canvas.save(image, target)


def _decoded(jobs: Sequence[Job], max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[tuple[Job, Future]]:
    """Each job with its photograph, read in the background a few ahead."""
    waiting: list[tuple[Job, Future]] = []
    for job in jobs:
        waiting.append((job, pool.submit(_read, job, max_pixels)))
        if len(waiting) > 4:
            yield waiting.pop(0)
    yield from waiting


def run(
    jobs: Sequence[Job],
    restore: Restore,
    overwrite: bool = False,
    max_pixels: int = canvas.MAX_PIXELS,
    progress: bool = False,
    at_once: int = AHEAD,
) -> Report:
    """Mends the photographs, decoding and encoding beside the model.

    Args:
        restore: gets up to `at_once` photographs, so that those of like shape can be one batch.
        overwrite: makes results anew that are there.
        max_pixels: larger photographs are refused.
        progress: shows a bar.
        at_once: results are written when so many are made: of tasks that make one after the other, 1.

    Raises:
        OSError: a result can't be written (no space, no permission): nothing half-written stays.
    """
    from tqdm import tqdm

    report = Report()
    report.failed = [(job.source, job.problem) for job in jobs if job.problem]
    jobs = [job for job in jobs if not job.problem]
    todo = [job for job in jobs if overwrite or not job.target.exists()]
    report.skipped = len(jobs) - len(todo)
    bar = tqdm(total=len(jobs), initial=report.skipped, unit="photo", disable=not progress)
    threads = [ThreadPoolExecutor(2, initializer=without_team) for _ in range(2)]
    with threads[0] as readers, threads[1] as writers:
        written: list[tuple[Job, Future]] = []

        def settle() -> None:
            job, future = written.pop(0)
            try:
                future.result()
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # what is wrong with the disk is so for all
                    raise
                report.failed.append((job.source, str(error)))
            else:
                report.done += 1

        def flush(some: list[tuple[Job, Picture, torch.Tensor | None]]) -> None:
            for job, result in _mended(some, restore):
                if isinstance(result, Image.Image):
                    written.append((job, writers.submit(_write, result, job.target)))
                else:
                    report.failed.append((job.source, str(result)))
                bar.update()
            while len(written) > 8:
                settle()

        some: list[tuple[Job, Picture, torch.Tensor | None]] = []
        for job, future in _decoded(todo, max_pixels, readers):
            try:
                some.append((job, *future.result()))
            except (ValueError, TypeError, OSError, MemoryError) as error:
                report.failed.append((job.source, str(error)))
                bar.update()
            pixels = sum(picture.size[0] * picture.size[1] for _, picture, _ in some)
            if len(some) >= at_once or pixels > AHEAD_PIXELS:
                flush(some)
                some = []
        flush(some)
        while written:
            settle()
    bar.close()
    return report


def _mended(
    some: list[tuple[Job, Picture, torch.Tensor | None]], restore: Restore
) -> Iterator[tuple[Job, Image.Image | Exception]]:
    """The results of some photographs together; one by one where that fails, so that it fails for one alone."""
    if not some:
        return
    jobs, pictures, masks = (list(column) for column in zip(*some, strict=True))
    try:
        images = restore(jobs, pictures, None if masks[0] is None else masks)
    except (ValueError, FloatingPointError, MemoryError) as error:
        if len(some) == 1:
            yield jobs[0], error
            return
        for one in some:
            yield from _mended([one], restore)
        return
    yield from zip(jobs, images, strict=True)
