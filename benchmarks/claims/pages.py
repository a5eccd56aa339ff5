"""What was found, as Markdown and as a figure; and a sheet of public-domain photographs.

python -m benchmarks.claims.pages                          # README's tables and the figure, from results/*.json
python -m benchmarks.claims.pages --sheet runs/claims --steps N     # the sheet, from the trained runs
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from palette_diffusers.files import write_text

HERE = Path(__file__).parent
MARK = "<!-- from here on written by pages.py -->"
DIGITS = {"frechet": 2, "psnr": 2, "ms_ssim": 3, "spread": 2, "accuracy": 3}
SHOWN = {
    "a": ("frechet", "accuracy", "psnr"),
    "b": ("frechet", "accuracy"),
    "c": ("frechet", "psnr", "spread", "ms_ssim"),
    "d": ("frechet", "psnr"),
}
NAMES = {
    "frechet": "FD-classifier, lower is better",
    "accuracy": "accuracy of the classifier",
    "psnr": "PSNR, median, dB",
    "spread": "distance of the classifier's features between samples",
    "ms_ssim": "MS-SSIM (3 scales, window 7) between samples, lower is more diverse",
}


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def _figure_table(results: dict[str, Any], figure: str) -> str:
    """Tasks down, runs across; the 95% interval over the photographs in brackets."""
    runs = list(dict.fromkeys(row["images"] for row in results["rows"]))
    cells = {(row["task"], row["images"]): row[figure] for row in results["rows"] if figure in row}
    digits = DIGITS[figure]
    lines = []
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        line = [task]
        for run in runs:
            x = cells.get((task, run))
            line.append("" if x is None else f"{x['value']:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]")
        lines.append(line)
    return f"{NAMES[figure]}:\n\n" + _table(["task", *runs], lines)


def _verdicts(results: dict[str, Any]) -> str:
    lines = []
    for one in results["verdicts"]:
        found = "; ".join(f"{task}: {said}" for task, said in one["outcomes"].items())
        lines.append([one["text"], f"{one['figure']} {one['expected']}", found, f"**{one['verdict']}**"])
    return _table(["comparison", "expected", "found", "verdict"], lines)


def _trained(results: dict[str, Any]) -> str:
    lines = [
        [f"{t['run']} {t['seed']}", f"{t['steps']:,}", f"{t['samples']:,}", f"{t['seconds'] / 60:.0f}",
         f"{t['parameters'] / 1e6:.2f}M", f"{t['worst_loss']:.2f}" if "worst_loss" in t else "",
         f"{t['judge']:.2f}, {t['fooled']:.0%}" if "judge" in t else ""]
        for t in results["trained"]
    ]  # fmt: skip
    head = ["run, seed", "steps", "samples", "minutes", "parameters", "highest loss / median", "discriminator, fooled"]
    return _table(head, lines)


def _stages(results: dict[str, Any]) -> str:
    rows = results["stages"]
    steps = sorted({row["step"] for row in rows})
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for run in dict.fromkeys((row["run"], row["seed"]) for row in rows):
            found = {r["step"]: r["frechet"]["value"] for r in rows if (r["task"], r["run"], r["seed"]) == (task, *run)}
            lines.append(
                [task, f"{run[0]} {run[1]}", *(f"{found[step]:.2f}" if step in found else "" for step in steps)]
            )
    return "FD-classifier after so many steps:\n\n" + _table(["task", "run, seed", *map(str, steps)], lines)


def _steps(results: dict[str, Any]) -> str:
    from benchmarks.solvers import table

    lines = []
    for task, numbers in results["verdicts"][0]["evaluations"].items():
        lines.append([task, *(", ".join(map(str, numbers[who] or ["none"])) for who in ("paper", "other"))])
    head = ["task", "the paper's sampler at its best: evaluations, distance", "as good with the fewest evaluations"]
    return _table(head, lines) + table(results["rows"]) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """A claim's verdicts, tables, and what was trained on what."""
    seeds = ", ".join(map(str, results["seeds"]))
    about = f"{results['photographs']} photographs of {results['data']}, seeds {seeds}, {results['hardware']}."
    parts = [f"## Claim {results['claim']}: {results['text']}\n", _verdicts(results)]
    if results["claim"] == "e":
        parts.append("FD-classifier by network evaluations:\n" + _steps(results))
    else:
        parts += [_figure_table(results, figure) for figure in SHOWN[results["claim"]]]
        parts += [_stages(results)] if results["stages"] else []
        parts.append(_trained(results))
    return "\n".join([*parts, about + "\n"])


def read(folder: Path = HERE / "results") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


def write_readme(results: list[dict[str, Any]], path: Path = HERE / "README.md") -> None:
    """Everything below the mark."""
    kept = path.read_text().partition(MARK)[0]
    write_text(path, kept + MARK + "\n\n" + "\n".join(markdown(one) for one in results))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel of bars for each claim, tasks side by side; and how quality came with training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = [one for one in results if one["claim"] != "e"]
    stages = next((one["stages"] for one in compared if one["stages"]), [])
    tasks = list(dict.fromkeys(row["task"] for row in stages))
    shape = (2 if tasks else 1, max(len(compared), len(tasks)))
    drawing, axes = plt.subplots(*shape, figsize=(17, 3.75 * shape[0]), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for panel, one in zip(axes[0], compared, strict=False):
        _bars(panel, one)
    for panel, task in zip(axes[-1], tasks, strict=False):
        _curves(panel, [row for row in stages if row["task"] == task], task)
    drawing.tight_layout()
    drawing.savefig(path, dpi=80)


def _bars(panel: Any, results: dict[str, Any]) -> None:
    """Means over the seeds; from the lowest to the highest end of their intervals."""
    panel.axis("on")
    rows = [row | {"run": row["images"].rpartition(" ")[0]} for row in results["rows"]]
    runs, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "task"))
    for i, run in enumerate(runs):
        places, values, spans = [], [], []
        for j, task in enumerate(tasks):
            found = [row["frechet"] for row in rows if (row["run"], row["task"]) == (run, task)]
            if found:
                places.append(j + (i - len(runs) / 2 + 0.5) * 0.8 / len(runs))
                values.append(mean := sum(x["value"] for x in found) / len(found))
                spans.append((mean - min(x["low"] for x in found), max(x["high"] for x in found) - mean))
        panel.bar(places, values, 0.8 / len(runs), yerr=list(zip(*spans, strict=True)), label=run, capsize=2)
    short = [task.replace("jpeg_restoration:", "JPEG ") for task in tasks]
    panel.set_xticks(range(len(tasks)), labels=short, rotation=35, ha="right")
    panel.set(title=f"claim {results['claim']}", ylabel="FD-classifier (lower is better)")
    panel.legend(fontsize=8)


def _curves(panel: Any, rows: list[dict[str, Any]], task: str) -> None:
    """A line a seed, a colour a run."""
    panel.axis("on")
    names = list(dict.fromkeys(row["run"] for row in rows))
    for name, seed in dict.fromkeys((row["run"], row["seed"]) for row in rows):
        points = [(r["step"], r["frechet"]["value"]) for r in rows if (r["run"], r["seed"]) == (name, seed)]
        first = seed == rows[0]["seed"]
        style = dict(marker="o", color=f"C{names.index(name)}", label=name if first else None)
        panel.plot(*zip(*points, strict=True), **style)
    panel.set(title=f"{task}, in training", xlabel="steps", ylabel="FD-classifier")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)


def draw_sheet(runs: list[str], folder: Path, steps: int, path: Path, seed: int = 0) -> None:
    """Photographs of scikit-image (public domain, CC0): the source, what each run made of it, the original."""
    from PIL import Image
    from skimage import data

    from palette_diffusers.evaluation.inputs import Batch, degrade, middle_square
    from palette_diffusers.report import draw_grid
    from palette_diffusers.tasks import Given

    from .measure import VARIANTS, Bench
    from .runs import RUNS, Scale

    photographs = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    clean = torch.stack([middle_square(photo, 64) for photo in photographs]).float() / 127.5 - 1
    bench = Bench(folder, Scale(steps), None, None)  # type: ignore[arg-type]
    several = {run: bench.restorer(run, seed, bench.scale.stages(RUNS[run])[-1], run) for run in runs}
    rows = []
    for variant in VARIANTS:
        given = Given.cat([degrade(variant, one, i) for i, one in enumerate(clean.split(1))])
        batch = Batch(variant, [f"{i}" for i in range(len(clean))], given, list(range(len(clean))))
        rows.append((variant, given.known))
        rows += [(run, restorer(batch)) for run, restorer in several.items()]
    draw_grid([*rows, ("original", clean)], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, default=None, help="folder of runs that the sheet is drawn from")
    parser.add_argument("--steps", type=int, default=6000, help="that they were trained")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(["regression", "GAN", "diffusion"], args.sheet, args.steps, HERE / "results" / "sheet.png")
        return
    results = read()
    write_readme(results)
    draw(results, HERE / "results" / "claims.png")


if __name__ == "__main__":
    main()
