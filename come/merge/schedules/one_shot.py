"""Measure the dense model once, and take groups from the best on."""

from __future__ import annotations

from come.merge.schedules.base import SCHEDULES, Choice, Schedule, Search


@SCHEDULES.register
class OneShot(Schedule):
    """Spans in the order of their scores on the dense model; nothing is measured again.

    Source: arXiv 2403.03853 (ShortGPT).
    """

    name = "one_shot"
    paper = "2403.03853"
    source = "ShortGPT, one ranking"
    remeasures = False
    restarts = True

    def choose(self, search: Search) -> Choice:
        """The eligible span with the lowest score on the dense model."""
        return search.lowest(search.rules.spans(search.history, search.target))
