"""Measures the dense model once, and takes spans in the order of their scores."""

from __future__ import annotations

from come.merge.combination import Combination
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search


@SCHEDULES.register
class OneShot(Schedule):
    """Takes spans in the order of their scores on the dense model, without remeasuring.

    Source: arXiv 2403.03853 (ShortGPT).
    """

    name = "one_shot"
    paper = "2403.03853"
    source = "ShortGPT, one ranking"
    remeasures = False
    restarts = True

    def check(self, method: Combination) -> None:
        """Raises ValueError for methods that cannot use scores of the dense model alone."""
        super().check(method)
        reason = None
        if method.operator.drops and method.m != 2:
            reason = f"drops single layers; merge.m={method.m} is not possible with it"
        elif method.allow_remerge and not method.operator.drops:
            reason = "measures the dense model once, so merge.allow_remerge=true is not possible"
        if reason:
            raise ValueError(f"merge.schedule={self.name} {reason}")

    def choose(self, search: Search) -> Choice:
        """The eligible span with the lowest score on the dense model."""
        return search.lowest(search.rules.spans(search.history, search.target))
