"""A cache of trial merges' scores and losses without layers, which no search measures twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from come.files import read_again, read_object, write_text


class TrialScores:
    """Scores of trial merges, keyed by the plan so far and the spans.

    The loss without a set of layers is that of spans of one layer each.

    Args:
        path: JSON file to which every new score is written atomically; None keeps them in memory.
        job: id of the job that the scores belong to; scores of other jobs are ignored.
    """

    def __init__(self, path: Path | None = None, job: str = "") -> None:
        self.path = path
        self.job = job
        self.scores: dict[str, float] = {}
        if path is not None:
            self.scores = read_again(path, self._read) or {}

    def _read(self, path: Path) -> dict[str, float]:
        data = read_object(path)
        if data["job"] != self.job:
            return {}
        return {key: float(score) for key, score in data["scores"].items()}

    def get(self, plan: str, *spans: tuple[int, int]) -> float | None:
        """The score of merging layers first..last of each span after a plan; None if not known."""
        return self.scores.get(_key(plan, spans))

    def add(self, plan: str, scores: Mapping[tuple[tuple[int, int], ...], float]) -> None:
        """Adds the scores of merges after a plan, by the first and last layer of their spans."""
        self.scores |= {_key(plan, spans): score for spans, score in scores.items()}
        if self.path is not None:
            data = {"job": self.job, "scores": self.scores}
            write_text(self.path, json.dumps(data, indent=1) + "\n")


def _key(plan: str, spans: Sequence[tuple[int, int]]) -> str:
    return f"{plan}/{','.join(f'{first}-{last}' for first, last in spans)}"
