"""Known weaknesses of what is pinned, by pip-audit:  python torture/audited.py constraints.txt [--where-reached]

Ends with 1 where one is known, or where a package could not be looked up; with `--where-reached`, as in CI, the latter
is only told, since a machine may have no network.
"""

import argparse
import json
import subprocess
import sys


def verdict(output: str, error: str, where_reached: bool) -> tuple[list[str], int]:
    """pip-audit's JSON and what it said => lines to print, exit code."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        said = error.strip().splitlines() or ["no answer"]
        return [f"no audit: {said[-1]}"], int(not where_reached)
    skipped = [p for p in packages if "skip_reason" in p]
    weak = [p for p in packages if p.get("vulns")]
    lines = [f"{p['name']} {p['version']}: {', '.join(v['id'] for v in p['vulns'])}" for p in weak]
    found = len(packages) - len(skipped)
    lines.append(f"{found} of {len(packages)} packages looked up, {len(weak)} with known weaknesses")
    return lines, int(bool(weak or (skipped and not where_reached)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constraints", help="file of pinned packages")
    parser.add_argument("--where-reached", action="store_true", help="packages that can't be looked up are only told")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "pip_audit", "-r", asked.constraints, "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        answer = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        answer = "", str(error)
    lines, code = verdict(*answer, asked.where_reached)
    print("\n".join(lines))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
