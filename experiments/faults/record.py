"""The campaign's records: one JSON line per case, and its counts."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BAD = ("lost", "half_written", "traceback", "hang", "leftover", "outside", "unclear")
"""What a case may find, each a defect."""


@dataclass
class Record:
    """Appends cases to `results.jsonl`; cases that are there already are not run again.

    With `again`, cases that found a defect are run again, after its repair.
    """

    path: Path
    part: str
    seed: int
    deadline: float
    again: bool = False
    work: Path = Path("work")
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.done = {
                row["case"] for row in rows(self.path) if not (self.again and row["found"])
            }

    def _without_paths(self, value: Any) -> str:
        """JSON in which the folder of the work and that of the package have names of their own."""
        text = json.dumps(value)
        for path, name in ((str(self.work), "WORK"), (str(ROOT), "CLONE"), (sys.prefix, "VENV")):
            text = text.replace(path, name)
        return text

    def wants(self, case: str) -> bool:
        """Whether a case is still to run, and there is time for it."""
        return case not in self.done and time.monotonic() < self.deadline

    def add(self, case: str, found: dict[str, str], **about: Any) -> None:
        """Writes a case; `found` has what is wrong with it, by the words of `BAD`."""
        assert set(found) <= set(BAD)
        about = json.loads(self._without_paths(about))
        found = json.loads(self._without_paths(found))
        row = {"case": case, "part": self.part, "seed": self.seed, **about, "found": found}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.add(case)
        if found:
            print(f"{case}: {json.dumps(found)[:600]}", flush=True)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a file, the last row of each; an incomplete line is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["case"]] = row
    yield from found.values()


def counts(path: Path) -> str:
    """A Markdown table of the cases of every part and what they found."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for row in rows(path):
        own = found.setdefault((row["part"], str(row.get("kind", ""))), Counter())
        own["cases"] += 1
        own["faults"] += row.get("faults", 1)
        own.update(row["found"].keys())
    heads = ["lost", "half_written", "traceback", "hang", "leftover", "outside", "unclear"]
    lines = [
        f"| part | fault | cases | faults | {' | '.join(h.replace('_', ' ') for h in heads)} |",
        f"|---|---|{'---:|' * (2 + len(heads))}",
    ]
    for (part, kind), own in sorted(found.items()):
        numbers = [own["cases"], own["faults"], *(own[head] for head in heads)]
        lines.append(f"| {part} | {kind} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def write_counts(results: Path, page: Path) -> None:
    """Replaces the table of a page of the documentation."""
    before, begin, rest = page.read_text().partition("<!-- counts -->\n")
    _, end, after = rest.partition("<!-- end of counts -->")
    page.write_text(before + begin + counts(results) + end + after)
