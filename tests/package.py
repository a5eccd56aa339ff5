"""Builds the wheel and the sdist, and tries each in a clean environment of every interpreter that is named.

    python tests/package.py python3.11 python3.12

Outside `make test`, because it installs torch. Needs the package `build`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

SMOKE = """
import json, time
begin = time.perf_counter()
import palette_diffusers
seconds = time.perf_counter() - begin
import numpy as np, torch
from palette_diffusers import PalettePipeline
pipe = PalettePipeline.from_pretrained()
pipe.set_progress_bar_config(disable=True)
image = torch.linspace(-1, 1, 3 * 70 * 90).reshape(1, 3, 70, 90)
out = pipe(image, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert out.shape == (1, 3, 70, 90) and out.isfinite().all()
print(json.dumps([palette_diffusers.__file__, round(seconds, 3), torch.__version__]))
"""


def run(*command: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stderr[-3000:]}")
    return done


def attempt(interpreter: str, package: Path, home: Path) -> None:
    """Installs without extras, samples, runs the command, and asks for what isn't installed."""
    environment = home / "venv"
    run(interpreter, "-m", "venv", environment)
    python, palette = environment / "bin" / "python", environment / "bin" / "palette"
    run(python, "-m", "pip", "install", "-q", package)
    where, seconds, torch = json.loads(run(python, "-c", SMOKE, cwd=home).stdout.splitlines()[-1])
    assert "site-packages" in where, where
    assert "colorization" in run(palette, "info", cwd=home).stdout
    assert "10.1M" in run(palette, "info", "--model", "starter-few-steps", cwd=home).stdout
    run(palette, "publish", "starter", "me/starter", "--dry-run", "tree", cwd=home)
    assert (home / "tree" / "palette_pipeline.py").is_file()
    for extra, *command in (
        ("[train]", python, ROOT / "train" / "train_palette.py", "--data", "x", "--output", "run"),
        ("[demo]", palette, "demo"),
        ("[eval]", palette, "evaluate", "starter", "--data", "x", "--features", "inception", "-o", "run"),
        ("[onnx]", palette, "export-network", "starter", "network"),
    ):
        missing = run(*command, cwd=home, check=False)
        assert missing.returncode == 2 and f"palette-diffusers{extra}" in missing.stderr, (command, missing.stderr)
    version = run(python, "--version").stdout.split()[-1]
    print(f"Python {version}, torch {torch}: {package.name} installs and runs; imported in {seconds} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs="*", default=[sys.executable])
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
        for number, interpreter in enumerate(parser.parse_args().interpreters):
            for package in sorted(dist.iterdir()):
                home = Path(folder) / f"{number}-{package.suffix[1:]}"
                home.mkdir()
                attempt(interpreter, package, home)


if __name__ == "__main__":
    main()
