"""The claims, and how a table decides one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .measure import VARIANTS
from .runs import TASKS

JPEG = tuple(v for v in VARIANTS if v.startswith("jpeg"))
OTHERS = tuple(v for v in VARIANTS if v not in JPEG)
SPECIALISTS = tuple(f"specialist, {task}" for task in TASKS)


@dataclass(frozen=True)
class Comparison:
    """`one` against `other` by a figure: `expected` is "lower", "higher", "same" or "no higher"."""

    text: str
    one: str
    other: str
    figure: str
    expected: str
    variants: tuple[str, ...] = VARIANTS


@dataclass(frozen=True)
class Claim:
    """What is trained and compared; `stages`: whose quality is followed through training."""

    text: str
    runs: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    stages: tuple[str, ...] = ()


CLAIMS = {
    "a": Claim(
        "diffusion is better than the same network as a regression, and than a conditional GAN",
        ("diffusion", "regression", "GAN"),
        (
            Comparison("better than regression, on every task", "diffusion", "regression", "frechet", "lower"),
            Comparison("better than a GAN, on every task", "diffusion", "GAN", "frechet", "lower"),
        ),
        stages=("diffusion", "regression", "GAN"),
    ),
    "b": Claim(
        "one network for all tasks holds up against specialists, and is better on JPEG",
        ("diffusion", *SPECIALISTS),
        (
            Comparison("not worse than specialists", "diffusion", "specialist", "frechet", "no higher", OTHERS),
            Comparison("better than specialists on JPEG", "diffusion", "specialist", "frechet", "lower", JPEG),
        ),
    ),
    "c": Claim(
        "L2 gives samples as good as L1, and more diverse",
        ("diffusion", "diffusion, L1"),
        (
            Comparison("equal quality", "diffusion", "diffusion, L1", "frechet", "same"),
            Comparison("more diverse", "diffusion", "diffusion, L1", "spread", "higher"),
        ),
    ),
    "d": Claim(
        "global attention is better than none, with as many parameters",
        ("diffusion", "diffusion, no attention"),
        (Comparison("better than none", "diffusion", "diffusion, no attention", "frechet", "lower"),),
    ),
}  # fmt: skip

PAPER = "paper's"
FAST = ("checkpoint's own", "ancestral, even in log-SNR", "DPM++ 2M, even in log-SNR", "UniPC, even in time")
AS_GOOD = 1.02  # times the distance that is to be reached
ALIKE = 0.1  # share that the means over all seeds may differ by and still be called the same
STEPS_CLAIM = "another solver reaches the best of the paper's sampler in fewer evaluations"

Rows = Mapping[tuple[str, str], dict[str, Any]]


def outcome(a: dict[str, float], b: dict[str, float]) -> str:
    """Where a figure lies relative to another, each with its 95% interval: "same" where the intervals overlap.

    >>> outcome({"low": 1, "high": 2}, {"low": 3, "high": 4})
    'lower'
    """
    return "lower" if a["high"] < b["low"] else "higher" if a["low"] > b["high"] else "same"


def outcomes(comparison: Comparison, rows: Rows, seeds: Iterable[int]) -> dict[str, str]:
    """By task. Overlapping intervals are weak evidence of sameness: "same" also takes means over all seeds that are
    alike, and is "unclear" otherwise, as where seeds disagree. rows: by (task, "RUN SEED")."""
    out, seeds = {}, list(seeds)
    for variant in comparison.variants:
        several = [
            [rows[variant, f"{run} {seed}"][comparison.figure] for seed in seeds]
            for run in (comparison.one, comparison.other)
        ]
        each = {outcome(*pair) for pair in zip(*several, strict=True)}
        one, other = (sum(figure["value"] for figure in figures) for figures in several)
        if comparison.expected == "no higher" and "higher" not in each and one <= (1 + ALIKE) * other:
            out[variant] = "lower" if each == {"lower"} else "no higher"
            continue
        clear = len(each) == 1 and (each != {"same"} or abs(one - other) <= ALIKE * abs(other))
        out[variant] = each.pop() if clear else "unclear"
    return out


def verdict(expected: str, found: Iterable[str]) -> str:
    """A claim about every task holds where every task says so; one task that clearly says the contrary refutes it.

    >>> verdict("lower", ["lower", "lower"]), verdict("lower", ["lower", "same"]), verdict("lower", ["lower", "higher"])
    ('holds', 'undecided', 'does not')
    """
    right, wrong = {
        "lower": ({"lower"}, {"higher"}),
        "higher": ({"higher"}, {"lower"}),
        "same": ({"same"}, {"lower", "higher"}),
        "no higher": ({"lower", "no higher"}, {"higher"}),
    }[expected]
    said = set(found)
    return "does not" if said & wrong else "holds" if said <= right else "undecided"


def decide(claim: Claim, rows: Rows, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Each comparison of a claim with its outcomes and its verdict."""
    seeds, out = list(seeds), []
    for comparison in claim.comparisons:
        found = outcomes(comparison, rows, seeds)
        out.append(
            {
                "text": comparison.text,
                "figure": comparison.figure,
                "expected": comparison.expected,
                "outcomes": found,
                "verdict": verdict(comparison.expected, found.values()),
            }
        )
    return out


def decide_steps(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Claim e, of the rows of `benchmarks/solvers.py`: the fewest evaluations at which any other solver or spacing is
    as good as the paper's sampler at its best."""
    found, numbers = {}, {}
    for task in dict.fromkeys(row["task"] for row in rows if row["solver"] == PAPER):
        here = [row for row in rows if row["task"] == task]
        best = min((row for row in here if row["solver"] == PAPER), key=lambda row: row["distance"])
        enough = [row for row in here if row["solver"] in FAST and row["distance"] <= AS_GOOD * best["distance"]]
        other = min(enough, key=lambda row: (row["evaluations"], row["distance"]), default=None)
        numbers[task] = {"paper": [best["evaluations"], best["distance"]], "other": None}
        if other is None:
            found[task] = "unclear"  # only that it is not reached within the steps that were tried
            continue
        numbers[task]["other"] = [other["solver"], other["evaluations"], other["distance"]]
        fewer = other["evaluations"] - best["evaluations"]
        found[task] = "lower" if fewer < 0 else "higher" if fewer else "same"
    return {
        "text": STEPS_CLAIM,
        "figure": "evaluations",
        "expected": "lower",
        "outcomes": found,
        "evaluations": numbers,
        "verdict": verdict("lower", found.values()),
    }
