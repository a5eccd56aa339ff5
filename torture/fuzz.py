"""Generated inputs, chunk by chunk, each in a process of its own, so that a crash of a decoder is a finding, too.

    python -m torture.fuzz --count 20000 --seed 0 --minutes 30

Goes on where it was stopped: finished chunks stand in `outputs/torture/fuzz-SEED.jsonl`, findings with their smallest
example in `outputs/torture/findings/`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from torture.log import Log

CHUNK = 400
SHARES = {"files": 0.4, "arrays": 0.1, "masks": 0.14, "sizes": 0.1, "tasks": 0.14, "pipeline": 0.08, "commands": 0.04}
OUTPUT = Path("outputs/torture")


def chunk(name: str, seed: int, count: int) -> dict[str, object]:
    """Checks `count` examples of a surface; the smallest that fails, if one does."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from torture.surfaces import SURFACES

    torch.set_num_threads(1)
    surface, seen = SURFACES[name], {"accepted": 0, "refused": 0}
    last: object = None

    @seeded(seed)
    @settings(max_examples=count, deadline=None, database=None, derandomize=False, print_blob=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(surface.strategy)
    def run(example: object) -> None:
        nonlocal last
        last = example
        seen[surface.check(example)] += 1

    begin, problem = time.time(), ""
    try:
        run()
    except Exception:
        problem = f"{last!r}\n{traceback.format_exc()}"
    return {"surface": name, "seed": seed, **seen, "seconds": round(time.time() - begin, 1), "problem": problem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--surface", choices=SHARES)
    parser.add_argument("--chunk", nargs=2, type=int, metavar=("SEED", "COUNT"), help="one chunk, in this process")
    asked = parser.parse_args()
    if asked.chunk:
        print(json.dumps(chunk(asked.surface, *asked.chunk)))
        return
    raise SystemExit(run(asked.count, asked.seed, asked.minutes, asked.surface))


def run(count: int, seed: int, minutes: float, only: str | None = None) -> int:
    """The exit code: 1 where something was found, in this call or an earlier one."""
    log = Log(OUTPUT / f"fuzz-{seed}.jsonl", "surface")
    (OUTPUT / "findings").mkdir(exist_ok=True)
    done = log.done()
    end = time.monotonic() + 60 * minutes
    plan = [(name, seed * 1_000_000 + number)
        for name, share in SHARES.items() if only in (None, name)
        for number in range(-(-round(count * share) // CHUNK))]  # fmt: skip
    for name, number in plan:
        if (name, number) in done:
            continue
        if time.monotonic() > end:
            print("out of time: go on with the same command")
            break
        line = isolated(name, number, CHUNK, end - time.monotonic())
        log.add(line)
        if line["problem"]:
            (OUTPUT / "findings" / f"{name}-{number}.txt").write_text(str(line["problem"]))
        print(*(f"{key} {line[key]}" for key in ("surface", "seed", "accepted", "refused", "seconds")), flush=True)
        print(str(line["problem"])[-3000:], end="", flush=True)
    for name in SHARES:
        lines = log.of(name)
        accepted, refused = (sum(line[key] for line in lines) for key in ("accepted", "refused"))
        bad = sum(bool(line["problem"]) for line in lines)
        print(
            f"{name}: {accepted + refused} inputs, {accepted} accepted, {refused} refused, {bad} chunks with findings"
        )
    return log.exit_code()


def isolated(name: str, number: int, count: int, seconds: float) -> dict[str, object]:
    """A chunk in its own process; a crash or a hang is its problem."""
    command = [sys.executable, "-m", "torture.fuzz", "--surface", name, "--chunk", str(number), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    empty = {"surface": name, "seed": number, "accepted": 0, "refused": 0, "seconds": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(600.0, seconds))
    except subprocess.TimeoutExpired as error:
        return empty | {"problem": f"hangs: {error}\n"}
    if done.returncode:
        return empty | {"problem": f"exit code {done.returncode}\n{done.stderr[-3000:]}\n"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
