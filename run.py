"""Compresses a language model: `python run.py model=smollm2_135m merge=come`."""

import sys

from come.config import main
from come.pipeline import run

if __name__ == "__main__":
    sys.exit(main(run))
