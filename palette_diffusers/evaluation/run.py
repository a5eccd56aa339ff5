"""`evaluate`: restorers, photographs and tasks => a folder of pictures and figures.

OUTPUT/originals/               features and pictures of the originals
OUTPUT/TASK/manifest.json       the hashes of what every restorer saw
OUTPUT/TASK/inputs/, masks/     the same as pictures
OUTPUT/TASK/ROW/                batches of figures, and pictures/NAME.png
OUTPUT/results.json, results.md, index.html, TASK.png
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..canvas import part_name
from ..files import alone, write_text
from ..sources import would_read
from . import inputs, metrics
from .features import FeatureNetwork, check_torchvision
from .inputs import Batch, Photographs
from .lpips import Lpips
from .restorers import Restorer, folder_name, write_pictures
from .store import Store, keep_facts, keep_row

DIVERSE = 100  # photographs that several samples are drawn of
SUBSETS, SUBSET = 20, 1000  # of the kernel distance
BUDGET = 2**28  # bytes of second moments held at once by the bootstrap


def processes() -> Any:
    """Accelerate's state of the processes that share the work; before a network is put on a device, since each
    process of several on GPUs gets its own."""
    from accelerate import PartialState

    cpu = not torch.accelerator.is_available()  # unless it is told, each process on CPUs takes itself for the only one
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def evaluate(
    restorers: Sequence[Restorer],
    photographs: Photographs,
    variants: Sequence[str],
    features: FeatureNetwork,
    output: Path,
    classifier: FeatureNetwork | None = None,
    reference: Photographs | None = None,
    manifest: Path | None = None,
    batch: int = 50,
    samples: int = 1,
    seed: int = 0,
    replicates: int = 100,
    progress: bool = True,
    lpips: Lpips | None = None,
) -> dict[str, Any] | None:
    """Measures restorers on the same degraded photographs; the same call goes on where a killed one stopped.

    Under `accelerate launch` the batches are shared by the processes; the figures are those of one process.

    Args:
        restorers: rows of the table; those that don't handle a task are left out of it.
        photographs: the originals.
        variants: tasks, as "jpeg_restoration" or "jpeg_restoration:5" (`inputs.VARIANTS`); one that is named twice
            is measured once.
        features: the network that distances and scores are measured by.
        output: a folder; restorers can be added to one that is there.
        classifier: the one whose accuracy is told, if it is not `features`.
        reference: the set that the Frechet and kernel distances compare with, if it is not the originals.
        manifest: another run's, whose pixels these must be; one task only.
        batch: images at a time.
        samples: of each of the first 100 photographs, for diversity.
        seed: of inputs and sampling.
        replicates: bootstrap samples.
        lpips: `load_lpips()`; without it, that figure is left out.

    Returns:
        What `results.json` holds; None in processes other than the main one.

    Raises:
        ValueError: too few photographs for the features, another run in `output`, a restorer's wrong results, an
            `output` in a folder that is read.
        FileExistsError: another evaluation is at work in `output`.
    """
    check_torchvision()
    _check_output(output, [photographs] if reference is None else [photographs, reference], restorers)
    variants = list(dict.fromkeys(variants))
    state = processes()
    run = _Run(photographs, features, classifier or features, output, batch, samples, seed, progress, state, lpips)
    with alone(output, state.process_index, "another evaluation is at work"):
        return run.evaluate(restorers, variants, reference, manifest, replicates)


def _check_output(output: Path, sets: Sequence[inputs.Photographs], restorers: Sequence[Restorer]) -> None:
    """Raises:
    ValueError: `output` is in a folder that is read: the next call would take its pictures for that folder's.
    """
    folders = [Path(one.path).expanduser() for one in sets if not one.listed]
    read = [path for path in folders if path.is_dir() and would_read(path, output, "validation")]
    results = [r.folder for r in restorers if r.folder and r.folder.is_dir()]
    read += [path for path in results if output.resolve().is_relative_to(path.resolve())]
    for folder in read:
        raise ValueError(f"output {output} is in {folder}, which is read: name a folder outside it")


def measured(output: Path) -> list[str]:
    """The variants that have a manifest in an evaluation's folder."""
    found = []
    for path in sorted(output.glob("*/manifest.json")):
        try:
            variant = str(inputs.read_manifest(path)["variant"])
        except ValueError:  # another program's
            continue
        if path.parent.name == folder_name(variant):
            found.append(variant)
    return found


def _parts(output: Path, variants: Sequence[str]) -> list[Path]:
    """Half-written files of an evaluation's own; others that lie in its folder are left alone."""
    tasks = [output / folder_name(variant) for variant in variants]
    rows = [path.parent for task in tasks for path in task.glob("*/about.json")]
    folders = [output / "originals", output / "reference", *tasks, *rows]
    folders += [folder / name for folder in folders for name in ("pictures", "inputs", "masks")]
    own = [output / f"{name}.part" for name in ("settings.json", "results.json", "results.md", "index.html")]
    grids = [path for task in tasks for path in output.glob(f"{part_name(task.with_suffix('.png'))}*.part")]
    return [path for path in own if path.exists()] + grids + [p for f in folders for p in f.glob("*.part")]


class _Run:
    """The photographs, cut into batches of which each process takes its share."""

    def __init__(
        self, photographs: Photographs, features: FeatureNetwork, classifier: FeatureNetwork, output: Path,
        batch: int, samples: int, seed: int, progress: bool, state: Any, lpips: Lpips | None,
    ):  # fmt: skip
        if batch < 1 or samples < 1:
            raise ValueError(f"batch is {batch}, samples {samples}: expected at least 1")
        if classifier is not features and classifier.name == features.name:
            classifier = replace(classifier, name=f"{classifier.name}-{classifier.content[:4]}")
        self.photographs, self.features, self.classifier = photographs, features, classifier
        self.output, self.batch, self.samples, self.seed = output, batch, samples, seed
        self.progress, self.state, self.lpips = progress, state, lpips
        self.names = [f"{i:05d}" for i in range(len(photographs))]
        self.notes = self._notes()

    def evaluate(
        self, restorers: Sequence[Restorer], variants: Sequence[str], reference: Photographs | None,
        manifest: Path | None, replicates: int,
    ) -> dict[str, Any] | None:  # fmt: skip
        self.check(restorers, variants, reference, manifest)
        self.originals("originals", self.photographs)
        if reference is not None:
            self.originals("reference", reference)
        for variant in variants:
            self.task(variant, [r for r in restorers if r.handles(inputs.check_variant(variant))], manifest)
        self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return None
        from .pages import write_pages

        compared = "originals" if reference is None else "reference"
        tasks = list(dict.fromkeys([*variants, *measured(self.output)]))
        results = _Summary(self, compared, replicates).results(restorers, tasks)
        write_text(self.output / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        write_pages(self.output, results)
        for part in _parts(self.output, tasks):  # left by a kill: nobody else is at work
            part.unlink()
        return results

    def _notes(self) -> list[str]:
        """Why accuracy is left out, if it is."""
        labels, classes = self.photographs.labels, self.photographs.classes
        _, logits = self.classifier(self.photographs.batch([0]))
        number = logits.shape[1]
        if min(labels) < 0:
            return ["accuracy is left out: the photographs have no labels"]
        if self.classifier.inception:
            return ["accuracy is left out: Inception's 1008 outputs are not ImageNet's classes, name a classifier"]
        theirs = self.classifier.classes
        if classes and theirs and len(classes) == len(theirs):
            for i, (one, other) in enumerate(zip(theirs, classes, strict=True)):
                if one.casefold() != other.casefold():
                    name = self.classifier.name
                    return [f"accuracy is left out: class {i} is {one!r} for {name}, {other!r} of the photographs"]
        if max(labels) >= number or (classes and len(classes) != number):
            return [
                f"accuracy is left out: {self.classifier.name} has {number} classes, "
                f"the photographs {len(classes) if classes else max(labels) + 1}"
            ]
        return []

    @property
    def labelled(self) -> bool:
        return not self.notes

    def check(
        self, restorers: Sequence[Restorer], variants: Sequence[str], reference: Photographs | None, manifest: Any
    ) -> None:
        """All that can be known to fail before anything is computed."""
        dimension = self.features(self.photographs.batch([0]))[0].shape[1]
        for name, few in (("", len(self.photographs)), ("reference ", len(reference or self.photographs))):
            if few <= dimension:
                raise ValueError(
                    f"{few} {name}photographs came, a distance in the {dimension} features of "
                    f"{self.features.name} needs at least {dimension + 1}"
                )
        if manifest is not None and len(variants) != 1:
            raise ValueError(f"a manifest belongs to one task, {len(variants)} came")
        rows = [restorer.name for restorer in restorers]
        if len(set(rows)) < len(rows) or {"originals", "inputs", "masks"} & set(rows):
            raise ValueError(f"rows are {', '.join(rows)}: expected names that differ, write NAME=... before one")
        for restorer in restorers:
            if self.photographs.size % restorer.multiple:
                raise ValueError(
                    f"size is {self.photographs.size}, expected a multiple of {restorer.multiple} for {restorer.name}"
                )
        for variant in variants:
            task = inputs.check_variant(variant)
            for restorer in restorers:
                if restorer.handles(task):
                    restorer.check(variant, self.names)
        settings = {
            "photographs": self.photographs.content,
            "data": Path(self.photographs.path).name,
            "count": len(self.photographs),
            "size": self.photographs.size,
            "features": f"{self.features.name} {self.features.content}".strip(),
            "classifier": f"{self.classifier.name} {self.classifier.content}".strip(),
            "reference": None if reference is None else [Path(reference.path).name, len(reference), reference.content],
            "lpips": None if self.lpips is None else self.lpips.content,
            "batch": self.batch,
            "seed": self.seed,
        }
        self.output.mkdir(parents=True, exist_ok=True)
        self._main_first(partial(keep_facts, self.output / "settings.json", settings))
        for variant in variants:
            for restorer in restorers:
                folder = self.output / folder_name(variant) / restorer.name
                if restorer.handles(inputs.check_variant(variant)):
                    about = restorer.about | ({"samples": self.samples} if restorer.stochastic else {})
                    content = restorer.content(variant)
                    folder.mkdir(parents=True, exist_ok=True)
                    self._main_first(partial(keep_row, folder, about | ({"content": content} if content else {})))

    def _main_first(self, do: Callable[[], None]) -> None:
        if self.state.is_main_process:
            do()
        self.state.wait_for_everyone()
        do()

    def batches(self, what: str, count: int, finished: Callable[[int], bool]) -> Any:
        """The numbers of this process's batches that are still to be done."""
        from tqdm import tqdm

        mine = range(-(-count // self.batch))[self.state.process_index :: self.state.num_processes]
        todo = [i for i in mine if not finished(i)]
        quiet = not (self.progress and self.state.is_main_process)
        return tqdm(todo, what, total=len(mine), initial=len(mine) - len(todo), disable=quiet)

    def _indices(self, i: int, photographs: Photographs) -> range:
        return range(i * self.batch, min((i + 1) * self.batch, len(photographs)))

    def store(self, *folders: str, count: int | None = None) -> Store:
        number = -(-(len(self.photographs) if count is None else count) // self.batch)
        return Store(self.output.joinpath(*folders), number)

    def originals(self, name: str, photographs: Photographs) -> None:
        store = self.store(name, count=len(photographs))
        for i in self.batches(name, len(photographs), store.done):
            begin = time.perf_counter()
            indices = self._indices(i, photographs)
            clean = photographs.batch(indices)
            if name == "originals":
                write_pictures(store.folder / "pictures", [self.names[k] for k in indices], clean)
            store.write(
                i, self.measure(clean, indices if name == "originals" else None), 0, time.perf_counter() - begin
            )
        self.state.wait_for_everyone()

    def measure(self, images: torch.Tensor, labelled: range | None) -> dict[str, torch.Tensor]:
        """What the networks say of pictures (B, 3, S, S), those of the photographs `labelled`."""
        features, logits = self.features(images)
        out = {"features": features, "logits": logits}
        if labelled is not None and self.labelled:
            other = self.classifier is not self.features
            classes = (self.classifier(images)[1] if other else logits).argmax(1)
            out["accuracy"] = (classes == torch.tensor([self.photographs.labels[k] for k in labelled])).float()
        return out

    def compare(
        self, several: list[torch.Tensor], clean: torch.Tensor, i: int, indices: range
    ) -> dict[str, torch.Tensor]:
        """All figures of restored pictures; those of further samples are in the list too."""
        several = [metrics.eight_bits(images) for images in several]  # as they are once written to files
        images, out = several[0], self.measure(several[0], indices)
        (original,) = self.store("originals").read(i, "features")
        out["distance"] = (out["features"] - original).norm(dim=1)
        out |= {"psnr": metrics.psnr(images, clean), "ssim": metrics.ssim(images, clean)}
        if self.lpips is not None:
            out["lpips"] = self.lpips(images, clean)
        if len(several) > 1:
            out |= self.diversity([images[: len(several[1])] for images in several])
        return out

    def task(self, variant: str, restorers: Sequence[Restorer], manifest: Path | None) -> None:
        folder = self.output / folder_name(variant)
        stores = [self.store(folder.name, restorer.name) for restorer in restorers]
        seen = Seen(folder, variant, self.photographs, self.seed, manifest)
        for i in self.batches(variant, len(self.photographs), lambda i: all(s.done(i) for s in stores)):
            indices = self._indices(i, self.photographs)
            clean = self.photographs.batch(indices)
            given = inputs.Given.cat(
                [inputs.degrade(variant, one, k, self.seed) for k, one in zip(indices, clean.split(1), strict=True)]
            )
            seen.keep(i, indices, clean, given)
            names = [self.names[k] for k in indices]
            batch = Batch(variant, names, given, [inputs.sampling_seed(k, self.seed) for k in indices])
            for restorer, store in zip(restorers, stores, strict=True):
                if store.done(i):
                    continue
                begin = time.perf_counter()
                images = [restorer(batch), *self._more(restorer, batch, indices)]
                restored = time.perf_counter()
                write_pictures(store.folder / "pictures", names, images[0])
                figures = self.compare(images, clean, i, indices)
                store.write(i, figures, restored - begin, time.perf_counter() - restored)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            seen.write_manifest()

    def _more(self, restorer: Restorer, batch: Batch, indices: range) -> list[torch.Tensor]:
        """Further samples of the same inputs."""
        some = indices[: max(0, DIVERSE - indices.start)]
        if not restorer.stochastic or not some:
            return []
        first = replace(batch, names=batch.names[: len(some)], given=batch.given.first(len(some)))
        seeds = [[inputs.sampling_seed(k, self.seed, sample) for k in some] for sample in range(1, self.samples)]
        return [restorer(replace(first, seeds=own)) for own in seeds]

    def diversity(self, several: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of samples of the same inputs, the mean over all pairs: MS-SSIM, the features' distance, LPIPS (the paper's
        section on diversity)."""
        features = [self.features(images)[0] for images in several]
        pairs = list(combinations(several, 2))
        apart = [(a - b).norm(dim=1) for a, b in combinations(features, 2)]
        out = {"ms_ssim": [metrics.ms_ssim(a, b) for a, b in pairs], "spread": apart}
        if self.lpips is not None:
            out["lpips_spread"] = [self.lpips(a, b) for a, b in pairs]
        return {name: torch.stack(values).mean(0) for name, values in out.items()}


class Seen:
    """What the restorers of a task saw: pictures, masks, and the manifest."""

    def __init__(self, folder: Path, variant: str, photographs: Photographs, seed: int, manifest: Path | None):
        self.folder, self.variant, self.photographs, self.seed = folder, variant, photographs, seed
        self.expected = None
        if manifest is not None:
            self.expected = inputs.read_manifest(manifest)
            for key, here in (("variant", variant), ("count", len(photographs))):
                if self.expected.get(key) != here:
                    raise ValueError(f"{manifest} has {key} {self.expected.get(key)!r}, this run {here!r}")
            self.manifest = manifest

    def _lines(self, i: int) -> Path:
        return self.folder / "inputs" / f"batch-{i:05d}.json"

    def keep(self, i: int, indices: range, clean: torch.Tensor, given: inputs.Given) -> None:
        """Raises:
        ValueError: other pixels than an earlier run's or the manifest's.
        """
        single = [
            inputs.Given(known, known, None if given.mask is None else given.mask[k : k + 1])
            for k, known in enumerate(given.known.split(1))
        ]
        lines = [
            inputs.describe(k, self.photographs.labels[k], one, source)
            for k, one, source in zip(indices, clean.split(1), single, strict=True)
        ]
        if self.expected is not None:
            inputs.compare(lines, self.expected["images"][indices.start : indices.stop], self.manifest)
        if self._lines(i).is_file():
            inputs.compare(lines, json.loads(self._lines(i).read_text()), self._lines(i).parent.parent)
            return
        names = [line["name"] for line in lines]
        write_pictures(self.folder / "inputs", names, given.known)
        if given.mask is not None:
            write_pictures(self.folder / "masks", names, given.mask.expand(-1, 3, -1, -1) * 2 - 1)
        write_text(self._lines(i), json.dumps(lines) + "\n")

    def write_manifest(self) -> None:
        """The batches' lines in one file, which the other runs are compared with."""
        lines = [
            line
            for path in sorted((self.folder / "inputs").glob("batch-*.json"))
            for line in json.loads(path.read_text())
        ]
        manifest = {
            "variant": self.variant,
            "data": Path(self.photographs.path).name,
            "count": len(self.photographs),
            "size": self.photographs.size,
            "seed": self.seed,
            "images": lines,
        }
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


class _Summary:
    """From batches on disk to figures with intervals."""

    def __init__(self, run: _Run, reference: str, replicates: int):
        self.run, self.replicates = run, replicates
        state = json.loads((run.output / "settings.json").read_text())
        count = state["reference"][1] if state["reference"] else state["count"]
        self.reference = run.store(reference, count=count)
        self.reference_count, self.paired = count, reference == "originals"
        self.frechet = metrics.Frechet(metrics.Moments.of(self.reference.stream("features")))
        self.counts = metrics.resamples(len(run.photographs), replicates, run.seed)
        self.subset = min(SUBSET, len(run.photographs) // 4, count // 4)

    def results(self, restorers: Sequence[Restorer], variants: Sequence[str]) -> dict[str, Any]:
        """The whole table: rows of this call, and those that an earlier one left in the folder."""
        begin = time.perf_counter()
        rows = [{"task": "originals", "images": "originals", **self.row(self.run.store("originals"))}]
        notes = list(self.run.notes)
        for variant in variants:
            folder = self.run.output / folder_name(variant)
            order = [r.name for r in restorers]
            there = [path.parent for path in folder.glob("*/about.json")]
            for path in sorted(there, key=lambda p: (order.index(p.name) if p.name in order else -1, p.name)):
                store = self.run.store(folder.name, path.name)
                if all(store.done(i) for i in range(store.number)):
                    about = json.loads((path / "about.json").read_text())
                    rows.append({"task": variant, "images": path.name, "about": about, **self.row(store)})
                    same = [r.content(variant) for r in restorers if r.name == path.name]
                    if same and same != [about.get("content", "")]:
                        notes.append(f"{path.name} of {variant} is an earlier call's, by another {path.name}")
        name = self.run.lpips.name if self.run.lpips else ""
        lpips = {"lpips": name, "lpips_spread": f"{name} between samples"} if name else {}
        return {
            "settings": json.loads((self.run.output / "settings.json").read_text()),
            "figures": {
                **self.run.features.figures,
                "accuracy": f"accuracy ({self.run.classifier.name})",
                "psnr": "PSNR (median, dB)",
                "ssim": "SSIM",
                "ms_ssim": metrics.ms_ssim_name(self.run.photographs.size),
                "spread": f"{self.run.features.figures['distance']} between samples",
                **lpips,
            },
            "notes": notes,
            "summary_seconds": round(time.perf_counter() - begin, 2),
            "rows": rows,
        }

    def row(self, store: Store) -> dict[str, Any]:
        """Every figure of a set with its 95% interval: {"value", "low", "high"}."""
        out: dict[str, Any] = {"restoring_seconds": store.seconds(0), "measuring_seconds": store.seconds(1)}
        out["frechet"] = self._frechet(store)
        if self.subset > 1:
            out["kernel"] = self._kernel(store)
        out["score"] = _figure(metrics.inception_scores(store.stream("logits"), self.counts))
        for name in ("accuracy", "distance", "psnr", "ssim", "lpips", "ms_ssim", "spread", "lpips_spread"):
            numbers = store.column(name)
            if len(numbers):
                statistic = np.median if name == "psnr" else np.mean
                counts = metrics.resamples(len(numbers), self.replicates, self.run.seed)
                out[name] = _figure([float(statistic(np.repeat(numbers, count))) for count in counts])
        return out

    def _frechet(self, store: Store) -> dict[str, float]:
        dimension = len(self.frechet.reference.mean)
        held = max(1, BUDGET // (8 * dimension**2))
        values: list[float] = []
        for first in range(0, len(self.counts), held):
            some = metrics.Moments.resampled(store.stream("features"), self.counts[first : first + held])
            values += [self.frechet(moments) for moments in some]
        figure = _figure(values)
        return figure | {"low": max(0.0, figure["low"])}

    def _kernel(self, store: Store) -> dict[str, float]:
        """The mean over random subsets, as KID's authors do; its interval is 1.96 standard deviations over the
        subsets, scaled from their m pictures to all n, and no bootstrap. It needs subsets of 2 pictures at least.

        A result and its own original are never in subsets that are compared: a pair would count as similarity.
        """
        rng = np.random.default_rng(self.run.seed)
        number, other, size = len(self.run.photographs), self.reference_count, self.subset
        values = []
        for _ in range(SUBSETS):
            drawn = rng.permutation(number)
            theirs = drawn[size:] if self.paired else rng.permutation(other)
            a, b = np.sort(drawn[:size]), np.sort(theirs[:size])
            values.append(metrics.kernel_distance(store.rows("features", a), self.reference.rows("features", b)))
        mean = float(np.mean(values))
        error = 1.96 * float(np.std(values, ddof=1)) * (size / (number - size)) ** 0.5
        return {"value": _round(mean), "low": _round(mean - error), "high": _round(mean + error)}


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _figure(values: Sequence[float]) -> dict[str, float]:
    """Of a figure and its values in bootstrap samples."""
    low, high = metrics.interval(values)
    return {"value": _round(values[0]), "low": _round(low), "high": _round(high)}
