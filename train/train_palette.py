"""Trains a Palette model:  accelerate launch train/train_palette.py --preset starter-64 --data PATH

Every setting of `TrainSettings` is an option; --help explains each. Settings start from the preset.
"""

import argparse
import json
import sys
from dataclasses import fields, replace

from palette_diffusers.training import PRESETS, TrainSettings, preset, train


def parse(arguments: list[str] | None = None) -> TrainSettings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="starter-64")
    for entry in fields(TrainSettings):
        kind = {"int": int, "float": float, "dict": json.loads}.get(getattr(entry.type, "__name__", entry.type), str)
        flag = "--" + entry.name.replace("_", "-")
        if entry.type in (bool, "bool"):
            parser.add_argument(flag, action="store_true", default=None, help=entry.metadata["help"])
        else:
            parser.add_argument(flag, type=kind, default=None, help=entry.metadata["help"])
    options = vars(parser.parse_args(arguments))
    start = preset(options.pop("preset"))
    return replace(start, **{name: value for name, value in options.items() if value is not None})


if __name__ == "__main__":
    try:
        train(parse())
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
