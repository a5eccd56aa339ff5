"""Distils a few-step student of a Palette model:

    accelerate launch train/distill_palette.py --teacher starter --init starter --data PATH

The settings are those of train_palette.py, from the preset distill-64; `--teacher` and `--init` name the pipeline, and
`--teacher-steps`, `--levels`, `--student-steps` and `--no-on-policy` say how; `--adversarial` adds a critic that
compares the student's pictures with photographs. A run that was stopped goes on with --resume.
"""

import sys

from palette_diffusers.training import main

if __name__ == "__main__":
    if "--preset" not in sys.argv:
        sys.argv[1:1] = ["--preset", "distill-64"]
    main(__doc__)
