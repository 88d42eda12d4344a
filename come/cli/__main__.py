"""`python -m come.cli`: the command where its script is not on the path."""

import sys

from come.cli import main

sys.exit(main())
