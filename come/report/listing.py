"""The list of a sweep's jobs; several processes may write to it concurrently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from come.files import AXES, LISTING


def list_job(folder: Path, entry: Mapping[str, Any]) -> None:
    """Appends a job, with its folder and its overrides, to the list of a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), open(folder / LISTING, "a") as file:
        file.write(json.dumps(entry) + "\n")


def make_report(folder: Path) -> str:
    """Writes a sweep's tables and figure from its finished jobs; returns the tables as Markdown."""
    from come.report.grid import read_grid, write_grid  # plotting is slow to import

    axes = folder / AXES
    with FileLock(folder / ".lock"):
        return write_grid(
            folder, *read_grid(folder), **(json.loads(axes.read_text()) if axes.is_file() else {})
        )
