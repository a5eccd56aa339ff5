"""Quality against network evaluations, of every task and several solvers.

    python benchmarks/solvers.py --data PATH/TO/tiny-imagenet --count 100 --output benchmarks/results/solvers.json
    python benchmarks/solvers.py --solvers "paper's" --steps 1000 ...       # adds its rows to the file
    python benchmarks/solvers.py --solvers ... --steps 4,8 --start 2 ...    # from the sources, partly noised
    python benchmarks/solvers.py --model starter-few-steps --solvers "checkpoint's own" --steps 1,2,4 --seeds 0,1,2 ...
    python benchmarks/solvers.py --output benchmarks/results/solvers.json --against "paper's,1000"

Quality is the Frechet distance of the small classifier's features (`classifier.py`), lower is better; every solver sees
the same sources and seeds, from all of the noise (`slow_noise` 1) and without `chroma_guidance`. A killed run goes on
with the same command. --table prints the file as Markdown and --figure draws it, both with the mean over seeds.
Seconds are the processor's, a picture, of `PalettePipeline.denoise` alone, on the row's `cpu`. Rows without one were
timed with the degrading of a task's first row, the classifier's features and the distance.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from palette_diffusers import PalettePipeline, PaletteScheduler
from palette_diffusers.evaluation import Photographs, frechet_distance, load_features
from palette_diffusers.evaluation.features import FeatureNetwork
from palette_diffusers.evaluation.inputs import PROTOCOLS, check_variant, degrade, sampling_seed
from palette_diffusers.evaluation.store import fingerprint
from palette_diffusers.files import write_text
from palette_diffusers.machine import best_device, best_dtype
from palette_diffusers.pipeline import SHIPPED, STARTER
from palette_diffusers.speed import build
from palette_diffusers.tasks import Given, get_task

if __package__:  # of the claims, which are a package
    from .peers import machine, numbers, output_file
else:
    from peers import machine, numbers, output_file

CLASSIFIER = f"{Path(__file__).with_name('classifier.py')}:load_classifier"
BATCH = 50
LEVELS = (2, 2.5, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20)  # of distance, with a line in the figure
NOISE = -20.0  # log-SNR at which a source is noise


@dataclass(frozen=True)
class Solver:
    """A scheduler's class, the changes of the checkpoint's configuration, and the steps that are measured."""

    kind: type
    steps: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)


FEW = (2, 4, 8, 16)
FULL_NOISE = {"initial_noise": 1.0, "source_eta": None}  # as every solver of the library starts
SOLVERS = {
    "checkpoint's own": Solver(PaletteScheduler, (1, 2, 3, 4, 6, 8, 12, 16, 32)),
    "its own, half of the slow noise": Solver(PaletteScheduler, (4, 8), {"slow_noise": 0.5}),
    "its own, as shipped": Solver(PaletteScheduler, (4, 8, 16), {"slow_noise": 0.0, "chroma_guidance": 1.0}),
    "its own, deterministic": Solver(PaletteScheduler, (8, 16), {"source_eta": None}),
    "DDIM, even in log-SNR": Solver(
        PaletteScheduler, (*FEW, 32), {"sampling_variance": "zero", "sampling_order": 1, **FULL_NOISE}
    ),
    "ancestral, even in log-SNR": Solver(
        PaletteScheduler, (*FEW, 32), {"sampling_variance": "fixed_small", "sampling_order": 1, **FULL_NOISE}
    ),
    "stochastic, second order": Solver(
        PaletteScheduler, (8, 12, 16, 20, 32), {"sampling_variance": "fixed_small", "sampling_order": 2, **FULL_NOISE}
    ),
    "paper's": Solver(
        PaletteScheduler, FEW,
        {"sampling_spacing": "paper", "sampling_variance": "fixed_large", "sampling_order": 1, **FULL_NOISE},
    ),
    "DDIM, even in time": Solver(diffusers.DDIMScheduler, FEW),
    "DPM++ 2M, even in log-SNR": Solver(diffusers.DPMSolverMultistepScheduler, FEW, {"use_lu_lambdas": True}),
    "DPM++ 2M, even in time": Solver(diffusers.DPMSolverMultistepScheduler, FEW),
    "SDE-DPM++ 2M, even in log-SNR": Solver(
        diffusers.DPMSolverMultistepScheduler, (16, 32), {"use_lu_lambdas": True, "algorithm_type": "sde-dpmsolver++"}
    ),
    "UniPC, even in time": Solver(diffusers.UniPCMultistepScheduler, FEW),
    "Euler, Karras": Solver(diffusers.EulerDiscreteScheduler, FEW, {"use_karras_sigmas": True}),
    "Heun, Karras": Solver(diffusers.HeunDiscreteScheduler, (2, 4, 8), {"use_karras_sigmas": True}),
}  # fmt: skip


class Bench:
    """The sources of every task, the features of their originals, and a pipeline that counts its evaluations."""

    def __init__(self, pipe: PalettePipeline, photographs: Photographs, features: FeatureNetwork):
        self.pipe, self.features = pipe, features
        self.config = dict(pipe.scheduler.config) | {"chroma_guidance": 0.0, "slow_noise": 1.0}
        self.clean = photographs.batch(range(len(photographs)))
        self.reference = features(self.clean)[0]
        self.sources: dict[str, list[Given]] = {}

    def given(self, task: str) -> list[Given]:
        """Batches of degraded photographs."""
        if task not in self.sources:
            each = [degrade(task, image, i) for i, image in enumerate(self.clean.split(1))]
            self.sources[task] = [Given.cat(each[i : i + BATCH]) for i in range(0, len(each), BATCH)]
        return self.sources[task]

    def measure(
        self, solver: Solver, steps: int, task: str, start: float | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """One point of the curve; `start` is the log-SNR at which sampling starts from the source, `seed` says which of
        a picture's seeds is taken."""
        self.pipe.scheduler = build(solver.kind, self.config, **solver.config)
        rules = copy.copy(get_task(task))
        if start is not None:
            rules.start = start
        evaluations, done, out, seconds, sources = 0, 0, [], 0.0, self.given(task)

        def counting(*inputs: torch.Tensor) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            return self.pipe._predict(*inputs)

        for given in sources:
            generators = [torch.Generator().manual_seed(sampling_seed(done + i, seed)) for i in range(len(given.known))]
            begin = time.process_time()
            sample = self.pipe.denoise(given, generators, steps, predict=counting, task=rules).cpu()
            seconds += time.process_time() - begin
            out.append(rules.compose(sample, given))
            done += len(given.known)
        distance = frechet_distance(self.features(torch.cat(out))[0], self.reference)
        return {
            "evaluations": evaluations // len(sources),
            "distance": round(distance, 3),
            "seconds": round(seconds / done, 4),
        }


def table(rows: list[dict]) -> str:
    """A Markdown table a task: solvers down, evaluations across."""
    out = []
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        columns = sorted({row["evaluations"] for row in here})
        out += [
            f"\n{task}\n",
            "| solver | " + " | ".join(map(str, columns)) + " |",
            "| --- " * (len(columns) + 1) + "|",
        ]
        for name in dict.fromkeys(label(row) for row in here):
            cells = {n: f"{distance:.2f}" for n, distance in points(here, name).items()}
            out.append(f"| {name} | " + " | ".join(cells.get(n, "") for n in columns) + " |")
    return "\n".join(out)


def against(rows: list[dict], solver: str, steps: int) -> str:
    """A Markdown table: distance and time of each label and number of steps, the means of its runs, beside those of so
    many steps of a solver with the starter. Of two starts of that the longer one's time is taken; times are compared
    where both were measured on one `cpu`."""
    out = [
        "| task | what | steps | evaluations | runs | distance | above | seconds | times as fast |",
        "| --- " * 9 + "|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        groups: dict[tuple[str, int], list[dict]] = {}
        for row in rows:
            if row["task"] == task:
                groups.setdefault((label(row), row["steps"]), []).append(row)
        those = [
            group for group in groups.values()
            if (group[0]["solver"], group[0]["steps"], group[0].get("model")) == (solver, steps, None)
        ]  # fmt: skip
        if not those:
            continue
        reference = max(those, key=lambda group: max(row["evaluations"] for row in group))
        longest = max(row["evaluations"] for row in reference)
        whole = [row for row in reference if row["evaluations"] == longest]
        cpu, distance = whole[0].get("cpu"), statistics.mean(row["distance"] for row in reference)
        slow = _seconds(whole, cpu)
        for (name, number), group in sorted(groups.items(), key=lambda item: item[1][0]["evaluations"]):
            distances = [row["distance"] for row in group]
            fast = _seconds(whole if group is reference else group, cpu)
            mean = statistics.mean(distances)
            spread = f" ± {statistics.stdev(distances):.2f}" if len(distances) > 1 else ""
            times = ("", "") if math.isnan(fast) else (f"{fast:.3f}", f"{slow / fast:.0f}x")
            evaluations = max(row["evaluations"] for row in group)
            cells = [task, name, number, evaluations, len(group), f"{mean:.2f}{spread}", f"{mean / distance - 1:+.1%}"]
            out.append("| " + " | ".join(map(str, [*cells, *times])) + " |")
    return "\n".join(out)


def _seconds(rows: list[dict], cpu: str | None) -> float:
    """The mean of the rows of this processor, NaN without any."""
    seconds = [row["seconds"] for row in rows if row.get("cpu") == cpu]
    return statistics.mean(seconds) if seconds else math.nan


def label(row: dict) -> str:
    model = f"{row['model']}, " if row.get("model") else ""
    name, start = model + row["solver"], row["start"]
    if start is None:
        return name
    return f"{name}, from noise" if start <= NOISE else f"{name}, from log-SNR {start:g}"


def points(rows: list[dict], name: str) -> dict[int, float]:
    """Evaluations => the mean of the seeds' distances, of the rows with this label; of the fewest steps that take so
    many."""
    mine = [row for row in rows if label(row) == name]
    curve: dict[int, float] = {}
    for evaluations, steps in sorted({(row["evaluations"], row["steps"]) for row in mine}):
        same = [row["distance"] for row in mine if (row["evaluations"], row["steps"]) == (evaluations, steps)]
        curve.setdefault(evaluations, statistics.mean(same))
    return curve


def from_far(start: float | None) -> bool:
    """Whether a task starts where it always does, or from noise."""
    return start is None or start <= NOISE


def figure(rows: list[dict], path: Path) -> None:
    """A panel a task: distance over evaluations, a line a solver; of those that start later, only the task's own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if from_far(row["start"])]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(label(row) for row in rows))
    drawing, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.8), squeeze=False)
    for panel, task in zip(axes[0], tasks, strict=True):
        for i, name in enumerate(names):
            curve = points([row for row in rows if row["task"] == task], name)
            if curve:
                style = dict(marker="os^vDPX"[i % 7], markersize=4, color=f"C{i}", linestyle="-" if i < 10 else ":")
                panel.plot(list(curve), list(curve.values()), label=name, **style)
        panel.set(title=task, xscale="log", yscale="log", xlabel="network evaluations")
        panel.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 1000], labels=map(str, ticks))
        low, high = panel.get_ylim()
        shown_levels = [level for level in LEVELS if low <= level <= high]
        panel.set_yticks(shown_levels, labels=[f"{level:g}" for level in shown_levels])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("FD-classifier (lower is better)")
    shown = {name: line for panel in axes[0] for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawing.legend(shown.values(), shown.keys(), loc="lower center", ncol=5, fontsize=8, frameon=False)
    drawing.tight_layout(rect=(0, 0.12, 1, 1))
    drawing.savefig(path, dpi=100)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def identity(model: str | None) -> str | None:
    """What rows call a model: None for the starter, a shipped one's name, a Hub id, or a folder's name with a hash of
    its files: two folders of one name are two models."""
    folder = SHIPPED.get(model or STARTER.name, Path(model or ""))
    if folder.resolve() in SHIPPED.values():
        return None if folder.resolve() == STARTER else folder.name
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin"))
    return f"{folder.resolve().name}@{fingerprint(*files)}"


def extend(
    path: Path, data: str, wanted: list[tuple[str, int, str, int]], count: int, model: str | None = None,
    start: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures the points (solver, steps, task, seed) that the file does not have, and writes each as it comes."""
    rows = read(path)
    shared = {"start": start, "count": count, "model": identity(model)}
    keys = [{"solver": n, "steps": s, "task": t, "seed": k} | shared for n, s, t, k in wanted]
    keys = [key for key in keys if not any(key.items() <= ({"model": None, "seed": 0} | row).items() for row in rows)]
    if not keys:
        return rows
    diffusers.utils.logging.set_verbosity_error()  # its solvers don't know all of our configuration
    device = best_device()
    pipe = PalettePipeline.from_pretrained(model, dtype=best_dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, Photographs(data, pipe.unet.config.sample_size, count), load_features(CLASSIFIER))
    cpu = {"cpu": machine()["cpu"]}
    for key in keys:
        rows.append(key | bench.measure(SOLVERS[key["solver"]], key["steps"], key["task"], start, key["seed"]) | cpu)
        print(json.dumps(rows[-1]), flush=True)
        write_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with validation-*.parquet; without it nothing is measured")
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--count", type=int, default=None, help="photographs; default: 200, without --data the file's")
    parser.add_argument("--tasks", default=",".join(PROTOCOLS["starter"]))
    parser.add_argument("--solvers", default=";".join(SOLVERS), help="names with semicolons between")
    parser.add_argument("--steps", type=numbers, default=[], help="with commas; default: the solver's own list")
    parser.add_argument("--seeds", type=numbers, default=[0], help="with commas: each is a run of its own")
    parser.add_argument("--start", type=float, default=None, help="log-SNR to start from the source at")
    parser.add_argument(
        "--output", type=output_file, required=True, help="JSON file; rows that it has are not measured again"
    )
    parser.add_argument("--table", action="store_true", help="print the file's rows as Markdown")
    parser.add_argument("--against", metavar="SOLVER,STEPS", help="print distances and times beside these, as Markdown")
    parser.add_argument("--figure", type=output_file, default=None, help="draw the file's rows (needs matplotlib)")
    args = parser.parse_args()

    shown = args.table or args.figure is not None or args.against is not None
    if not args.data and not shown:
        parser.error("nothing to do, expected --data, --table, --against or --figure")
    if unknown := set(args.solvers.split(";")) - set(SOLVERS):
        parser.error(f"--solvers has {'; '.join(sorted(unknown))}, expected some of {'; '.join(SOLVERS)}")
    if args.count is not None and args.count < 2:
        parser.error(f"--count is {args.count}, expected at least 2")
    if args.figure and not importlib.util.find_spec("matplotlib"):
        parser.error("--figure needs matplotlib, which is not installed")
    if 0 in args.steps:
        parser.error("--steps has 0, expected at least 1")
    solver, _, steps = (args.against or "").rpartition(",")
    if args.against is not None and not (solver in SOLVERS and steps.isdecimal()):
        parser.error(f"--against is {args.against!r}, expected a solver and its steps: paper's,1000")
    try:
        tasks = [check_variant(task) and task for task in args.tasks.split(",")]
    except ValueError as error:
        parser.error(f"--tasks: {error}")
    rows = read(args.output)
    counts = sorted({row["count"] for row in rows})
    if not args.data:
        there = f"{args.output} has rows of {', '.join(map(str, counts)) or 'no'} photographs"
        if args.count is None and len(counts) != 1:
            parser.error(f"{there}: expected --count, one of them, or --data to measure")
        if args.count is not None and args.count not in counts:
            parser.error(f"--count is {args.count}, but {there}")
    count = args.count or (200 if args.data else counts[0])
    same = [row for row in rows if row["count"] == count]
    if args.figure and not any(map(from_far, [row["start"] for row in same] + [args.start] * bool(args.data))):
        parser.error(f"--figure draws rows from a task's own start or from noise, {args.output} has none")
    if args.against is not None and not any((row["solver"], row["steps"]) == (solver, int(steps)) for row in same):
        parser.error(f"--against is {args.against!r}, but {args.output} has no such row of {count} photographs")
    if args.data:
        wanted = [
            (name, steps, task, seed)
            for name in args.solvers.split(";")
            for steps in (args.steps or SOLVERS[name].steps)
            for task in tasks
            for seed in args.seeds
        ]
        rows = extend(args.output, args.data, wanted, count, args.model, args.start)
    same = [row for row in rows if row["count"] == count]
    if args.table:
        print(table(same))
    if args.against is not None:
        print(against(same, solver, int(steps)))
    if args.figure:
        figure(same, args.figure)


if __name__ == "__main__":
    main()
