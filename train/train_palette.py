"""Trains a Palette model:  accelerate launch train/train_palette.py --preset starter-64 --data PATH

Every setting is an option, below; settings start from the preset. A run that was stopped goes on with --resume.
"""

from palette_diffusers.training import main

if __name__ == "__main__":
    main(__doc__)
