"""A folder of photographs, mended by a Ray Data job:  python examples/ray_folder.py ALBUM MENDED --task colorization

ALBUM and MENDED are folders, or fsspec URLs (s3://..., with the package of that store). Results that are there already
are passed over; a worker that dies is replaced, and what it had begun is begun again. Each is written under a temporary
name first. Needs `pip install 'palette-diffusers[ray]'`.
"""

import argparse
import os
import posixpath
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import ray

from palette_diffusers.canvas import SUFFIXES


class Mend:
    """One worker: it loads the model once."""

    def __init__(self, task: str, model: str | None):
        import torch

        from palette_diffusers import PalettePipeline

        torch.set_num_threads(1)
        self.task, self.pipe = task, PalettePipeline.from_pretrained(model)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import torch

        from palette_diffusers import canvas

        files, path = fsspec.core.url_to_fs(row["target"])
        if files.exists(path):  # by a worker that died before it could say so
            return row | {"pid": os.getpid(), "error": ""}
        with tempfile.TemporaryDirectory() as name:  # as files: a JPEG's coefficients are read, metadata is kept
            photo, result = Path(name, "photo" + posixpath.splitext(path)[1]), Path(name, "result.png")
            with fsspec.open(row["source"]) as file:
                photo.write_bytes(file.read())
            try:
                generator = torch.Generator().manual_seed(0)
                image = self.pipe(photo, task=self.task, generator=generator).images[0]
            except (ValueError, OSError) as error:  # a broken photograph; what is wrong with the store is raised
                return row | {"pid": os.getpid(), "error": str(error).replace(str(photo), row["source"])}
            canvas.save(image, result)
            write(row["target"], result.read_bytes())
        return row | {"pid": os.getpid(), "error": ""}


def write(target: str, content: bytes) -> None:
    """Whole or not at all: an object store shows an object when it is closed, a folder gets it by renaming."""
    files, path = fsspec.core.url_to_fs(target)
    part = f"{path}.part"  # the same for a worker that begins again
    files.makedirs(posixpath.dirname(path), exist_ok=True)
    files.pipe_file(part, content)
    files.mv(part, path)


def jobs(source: str, output: str) -> list[dict[str, str]]:
    """The photographs of a folder that have no result yet."""
    files, root = fsspec.core.url_to_fs(source)
    out_files, out_root = fsspec.core.url_to_fs(output)
    done = set(out_files.find(out_root)) if out_files.exists(out_root) else set()
    rows: dict[str, str] = {}
    for path in sorted(files.find(root)):
        stem, suffix = posixpath.splitext(path)
        target = out_root + stem.removeprefix(root) + ".png"
        if suffix.lower() in SUFFIXES and target not in done:
            if target in rows:
                raise ValueError(f"{rows[target]} and {path} would both write {target}")
            rows[target] = path
    return [
        {"source": files.unstrip_protocol(path), "target": out_files.unstrip_protocol(target)}
        for target, path in rows.items()
    ]


def mend(source: str, output: str, task: str, model: str | None = None, workers: int = 2) -> list[dict[str, Any]]:
    """What became of each photograph, "" or the reason as `error`."""
    rows = jobs(source, output)
    if not rows:
        return []
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = data.map(
        Mend, fn_constructor_args=(task, model), compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1,
        max_restarts=-1, max_task_retries=-1,
    )  # fmt: skip
    return done.take_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--task", default="colorization", help="colorization or jpeg_restoration")
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows = mend(args.source, args.output, args.task, args.model, args.workers)
    failed = [row for row in rows if row["error"]]
    print(f"{len(rows) - len(failed)} done, {len(failed)} failed, by {len({row['pid'] for row in rows})} workers")
    for row in failed:
        print(f"{row['source']}: {row['error']}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
