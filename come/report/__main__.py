"""Writes tables and figure of a sweep from its finished jobs: python -m come.report FOLDER."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from come.files import AXES, LISTING
from come.report.grid import read_grid, write_grid
from come.report.records import PARAMETERS


def main() -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m come.report", description=__doc__)
    parser.add_argument("grid", type=Path, help="the grid's folder, with jobs.jsonl")
    parser.add_argument("--out", type=Path, help="where to write; the grid's folder by default")
    parser.add_argument(
        "--also", type=Path, action="append", default=[], help="results.jsonl of the same grid"
    )
    parser.add_argument("--x", help="horizontal axis of the figure; the sweep's by default")
    parser.add_argument("--title", help="title of the figure; the sweep's by default")
    arguments = parser.parse_args()
    needed = [*arguments.also, *([] if arguments.also else [arguments.grid / LISTING])]
    for path in needed:
        if not path.is_file():
            sys.stderr.write(f"error: {path} is not there; a sweep (-m) writes it\n")
            return 1
    rows, missing = read_grid(arguments.grid, arguments.also)
    noted = arguments.grid / AXES
    axes = {"x": PARAMETERS, "title": ""}
    axes |= json.loads(noted.read_text()) if noted.is_file() else {}
    axes |= {key: value for key in axes if (value := getattr(arguments, key)) is not None}
    sys.stdout.write(write_grid(arguments.out or arguments.grid, rows, missing, **axes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
