"""A claim of the paper, tested small: trains what it compares, measures it, and says what came out.

    python -m benchmarks.claims.run --claim a --data PATH/TO/tiny-imagenet

--data is a folder with train-*.parquet and validation-*.parquet. A killed run goes on with the same command; more
--steps go on from where fewer ended; runs that claims share are trained once. README.md says what was found.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks import solvers
from benchmarks.peers import processor
from palette_diffusers.evaluation import Photographs, load_features
from palette_diffusers.files import write_text
from palette_diffusers.machine import best_device, best_dtype

from . import pages
from .measure import VARIANTS, Bench, facts, run_folder
from .runs import Scale, train_run
from .verdicts import CLAIMS, FAST, PAPER, STEPS_CLAIM, decide, decide_steps

HERE = Path(__file__).parent
CURVE = HERE.parent / "results" / "solvers.json"


def hardware() -> str:
    device = best_device()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()[0]}, {torch.get_num_threads()} threads"
    return f"{name}, {str(best_dtype(device)).removeprefix('torch.')}, torch {torch.__version__}, {platform.system()}"


def compare(letter: str, args: argparse.Namespace, scale: Scale, count: int) -> dict[str, Any]:
    """Claims a to d: training, figures, verdicts."""
    claim = CLAIMS[letter]
    for seed in args.seeds:
        for name in claim.runs:
            print(f"{name}, seed {seed}", flush=True)
            train_run(name, args.data, run_folder(args.folder, name, seed), seed, scale)
    photographs = Photographs(args.data, scale.size, count)
    bench = Bench(args.folder, scale, photographs, load_features(args.features, best_device()))
    rows = bench.ends(claim.runs, args.seeds)
    return {
        "claim": letter,
        "text": claim.text,
        "verdicts": decide(claim, {(row["task"], row["images"]): row for row in rows}, args.seeds),
        "hardware": hardware(),
        "data": Path(args.data).name,
        "photographs": count,
        "seeds": args.seeds,
        "figures": bench.features.figures,
        "trained": [facts(name, seed, args.folder, scale) for seed in args.seeds for name in claim.runs],
        "rows": rows,
        "stages": bench.stages(claim.stages, args.seeds) if args.curve else [],
    }


def steps(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Claim e: the shipped starter by several samplers, in ever more steps; the rows are those of solvers.py."""
    tasks = list(dict.fromkeys(variant.partition(":")[0] for variant in VARIANTS))
    points = [(n, k, task) for task in tasks for n in (PAPER, *FAST) for k in solvers.SOLVERS[n].steps]
    rows = solvers.extend(CURVE, args.data, points, count)
    rows = [row for row in rows if row["count"] == count and row["start"] is None and not row.get("model")]
    return {
        "claim": "e",
        "text": STEPS_CLAIM,
        "verdicts": [decide_steps(rows)],
        "hardware": hardware(),
        "data": Path(args.data).name,
        "photographs": count,
        "seeds": [0],
        "rows": [row for row in rows if row["solver"] in (PAPER, *FAST)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", required=True, help="letters with commas: a, b, c, d, e")
    parser.add_argument("--data", required=True, help="folder with train-*.parquet and validation-*.parquet")
    parser.add_argument("--steps", type=int, default=6000, help="of training, the same for every run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stages", type=int, default=4, help="parts of training, after each of which it is measured")
    parser.add_argument("--curve", action=argparse.BooleanOptionalAction, default=True, help="measure the stages too")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--network", type=json.loads, default={}, help="JSON: changes of every run's network")
    parser.add_argument("--seeds", default="0", help="of training, with commas")
    parser.add_argument("--count", type=int, default=None, help="photographs that are measured: 500; 200 for e")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare samples")
    parser.add_argument("--features", default=solvers.CLASSIFIER, help="FILE.py:FUNCTION, as palette evaluate takes it")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="runs and pictures")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="a JSON file for each claim")
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    letters = args.claim.split(",")
    if unknown := set(letters) - {*CLAIMS, "e"}:
        parser.error(f"--claim is {', '.join(sorted(unknown))}, expected some of {', '.join(CLAIMS)}, e")
    args.output.mkdir(parents=True, exist_ok=True)
    scale = Scale(args.steps, args.batch, args.size, args.network, args.workers, args.stages)
    for letter in letters:
        results = steps(args, args.count or 200) if letter == "e" else compare(letter, args, scale, args.count or 500)
        write_text(args.output / f"{letter}.json", json.dumps(results, indent=1) + "\n")
        print(pages.markdown(results), flush=True)


if __name__ == "__main__":
    main()
