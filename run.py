"""The command `come` from a clone: `python run.py model=smollm2_135m merge=come`."""

import sys

from come.cli import main

if __name__ == "__main__":
    sys.exit(main())
