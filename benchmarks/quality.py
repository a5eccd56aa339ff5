"""Quality of a checkpoint on validation photographs, by the small classifier's features; with another solver, another
configuration or another start, which `palette evaluate` does not have.

    python benchmarks/quality.py --data PATH/TO/tiny-imagenet --count 2000 --folder runs/quality
"""

import argparse
import json
from pathlib import Path

import diffusers
import torch
from peers import output_file

from palette_diffusers import PalettePipeline
from palette_diffusers.evaluation import Photographs, evaluate, load_features, load_restorer
from palette_diffusers.evaluation.inputs import PROTOCOLS
from palette_diffusers.evaluation.pages import markdown
from palette_diffusers.evaluation.restorers import from_pipeline
from palette_diffusers.scheduler import check_solver
from palette_diffusers.speed import build

CLASSIFIER = f"{Path(__file__).with_name('classifier.py')}:load_classifier"


def numbers(results: dict) -> dict[str, dict]:
    """What `palette publish` puts into a card."""
    digits = {"frechet": 3, "accuracy": 4, "psnr": 2}
    names = {"frechet": results["figures"]["frechet"], "accuracy": "accuracy", "psnr": "PSNR"}
    out: dict[str, dict] = {}
    for row in results["rows"]:
        figures = {names[key]: round(row[key]["value"], digits[key]) for key in digits if key in row}
        out.setdefault(row["task"], {})[row["images"]] = figures
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with validation-*.parquet")
    parser.add_argument("--model", default=None, help="folder or Hub id; default: the starter checkpoint")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--samples", type=int, default=1, help="of each of the first 100, for diversity")
    parser.add_argument("--solver", default=None, help="a diffusers scheduler's class; default: the checkpoint's")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: changes of the scheduler's configuration")
    parser.add_argument("--start", type=float, default=None, help="log-SNR to start from the source at; an experiment")
    parser.add_argument("--tasks", default=",".join(PROTOCOLS["starter"]))
    parser.add_argument("--folder", type=Path, required=True, help="of the run: pictures, page, what a kill leaves")
    parser.add_argument(
        "--output", type=output_file, default=None, help="JSON file: task => images => figure => number"
    )
    args = parser.parse_args()
    solver = args.solver and getattr(diffusers, args.solver, None)
    if args.solver and not (isinstance(solver, type) and issubclass(solver, diffusers.SchedulerMixin)):
        parser.error(f"--solver is {args.solver!r}, expected a scheduler's class in diffusers: UniPCMultistepScheduler")

    pipe = PalettePipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    pipe.scheduler = build(solver or type(pipe.scheduler), pipe.scheduler.config, **args.config)
    try:
        check_solver(pipe.scheduler)
    except ValueError as error:
        parser.error(f"--solver: {error}")
    changes = {} if args.start is None else {"start": args.start}
    palette = from_pipeline(pipe, steps=args.steps, about={"config": args.config}, **changes)
    baselines = [load_restorer(name, PalettePipeline.from_pretrained) for name in ("identity", "telea")]
    photographs = Photographs(args.data, pipe.unet.config.sample_size, args.count)
    features = load_features(CLASSIFIER)
    rows = [*baselines, palette]
    sizes = {"batch": args.batch, "samples": args.samples}
    results = evaluate(rows, photographs, args.tasks.split(","), features, args.folder, **sizes)
    if results is not None:
        print(markdown(results), end="")
    if results is not None and args.output:
        args.output.write_text(json.dumps({"count": args.count, "results": numbers(results)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
