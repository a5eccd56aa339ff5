"""What share of the package the tests ran, by `make coverage`: lines and branches, each with its own limit."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LIMITS = {"percent_statements_covered": 95.0, "percent_branches_covered": 90.0}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-i", "-o", path], check=True)
        totals = json.loads(path.read_text())["totals"]
    for name, limit in LIMITS.items():
        print(f"{name}: {totals[name]:.1f}, at least {limit:g} is asked for")
    raise SystemExit(int(any(totals[name] < limit for name, limit in LIMITS.items())))


if __name__ == "__main__":
    main()
