"""`python -m come.cli` runs the command `come` if its script is not on the PATH."""

import sys

from come.cli import main

sys.exit(main())
