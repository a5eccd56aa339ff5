"""Trains a Palette model:  accelerate launch train/train_palette.py --preset starter-64 --data PATH

Every setting is an option, below; settings start from the preset. A run that was stopped goes on with --resume.
"""

import sys

import torch

from palette_diffusers.training import parse, train

if __name__ == "__main__":
    try:
        train(parse(description=__doc__))
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'palette-diffusers[train]'", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except torch.AcceleratorError as error:
        advice = "error: the accelerator failed or is gone; --resume goes on from the last checkpoint:"
        print(advice, str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(1)
