"""The campaign of faults: python experiments/faults/run.py --part kills --minutes 15.

kills   SIGKILL, SIGTERM, SIGINT and too little memory at random moments; SIGKILL before a random
        change of a file
disk    a full disk and a read-only folder at each stage; two processes on one job; a clock that
        jumps
files   truncated, empty and foreign files in a job folder and in the caches
inputs  wrong settings and files, each with one clear line
fuzz    plans, results, configurations, overrides and safetensors headers, changed at random

Cases are appended to results.jsonl, and cases that are there are left out, so an interrupted
campaign continues. A campaign is determined by its seed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]
PARTS = ("kills", "disk", "files", "inputs", "fuzz")


def main() -> int:
    """Runs the parts, prints the counts; the exit code is 1 if a defect was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--minutes", type=float, default=30, help="at most, of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="kills or examples, for a shorter campaign")
    parser.add_argument("--only", default="", help="one scenario of kills or disk")
    parser.add_argument("--again", action="store_true", help="repeats cases that found a defect")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--work", type=Path, help="a folder to keep; a temporary one by default")
    arguments = parser.parse_args()
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(name, value)

    from forked import preload, start
    from jobs import Workspace, scenarios
    from record import Record, counts, write_counts

    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        work = Workspace((arguments.work or Path(temporary)).resolve())
        if not (work.merged / "result.json").is_file():
            made = start([], work.folder / "made", main=lambda: work.create() or 0).wait()
            assert made.code == 0, made.err
            words = [*scenarios(work)["memory"].words, "merge.refit=ridge"]
            first = start([*words, f"hydra.run.dir={work.merged}"], work.folder / "made").wait()
            assert first.code == 0, first.err
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            deadline = time.monotonic() + 60 * arguments.minutes
            record = Record(
                arguments.results, part, arguments.seed, deadline, arguments.again, work.folder
            )
            options = {"count": arguments.count} if arguments.count else {}
            if arguments.only:
                options["only"] = arguments.only
            getattr(importlib.import_module(part), part)(work, record, **options)
    print(counts(arguments.results))
    if arguments.results == HERE / "results.jsonl":
        write_counts(arguments.results, HERE.parents[1] / "docs" / "faults.md")
    from record import rows

    return int(any(row["found"] for row in rows(arguments.results)))


if __name__ == "__main__":
    sys.exit(main())
