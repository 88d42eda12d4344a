"""Scores of trial merges, kept so that an interrupted search does not try them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from come.files import write_text


class TrialScores:
    """Scores by the plan so far and the span that was merged on trial.

    Args:
        path: JSON file that every new score is written to, atomically; None keeps them in memory.
        job: of which job the scores are; those of another job are not read.
    """

    def __init__(self, path: Path | None = None, job: str = "") -> None:
        self.path = path
        self.job = job
        self.scores: dict[str, float] = {}
        if path is not None and path.is_file():
            data = json.loads(path.read_text())
            if data["job"] == job:
                self.scores = data["scores"]

    def score(self, plan: str, first: int, last: int, compute: Callable[[], float]) -> float:
        """The score of merging layers first..last after a plan, computed where it is not known."""
        key = f"{plan}/{first}-{last}"
        if key not in self.scores:
            self.scores[key] = compute()
            if self.path is not None:
                data = {"job": self.job, "scores": self.scores}
                write_text(self.path, json.dumps(data, indent=1) + "\n")
        return self.scores[key]
