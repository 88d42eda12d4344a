"""Merges the best span, measures the model again, and repeats."""

from __future__ import annotations

from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search


@SCHEDULES.register
class Progressive(Schedule):
    """Takes the span with the lowest score in the current model, and remeasures after every merge.

    Source: arXiv 2510.15304, the progressive strategy; SLEB (arXiv 2402.09025) is the same for
    drops.
    """

    name = "progressive"
    paper = "2510.15304"
    source = "CoMe, progressive merging"

    def choose(self, search: Search) -> Choice:
        """The eligible span with the lowest score."""
        return search.lowest(search.rules.spans(search.history, search.target))
