"""Spans given by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from come.merge.combination import Combination
from come.merge.plan import Plan, SpanCandidate
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search


@SCHEDULES.register
@dataclass(eq=False)
class Fixed(Schedule):
    """Takes the spans of `merge.groups` in their order; a drop keeps the first layer of each.

    The model is measured again after every merge, as with the progressive schedule. A span of one
    layer is only refitted; it has no score (0).

    Attributes:
        groups: original layers of each span, from `merge.groups`.
    """

    name = "fixed"
    paper = ""
    source = "given by hand"
    uses_scores = False

    groups: Sequence[Sequence[int]] = field(init=False, repr=False, default=())

    def check(self, method: Combination) -> None:
        """Raises ValueError if `merge.groups` is empty."""
        if not method.groups:
            raise ValueError("merge.schedule=fixed needs merge.groups, such as [[3,4],[10,11,12]]")

    def finished(self, plan: Plan, target: int) -> bool:
        """Whether all spans are merged or refitted."""
        return len(plan.steps) >= len(self.groups)

    def choose(self, search: Search) -> Choice:
        """The next span; its score is only recorded."""
        span = self.groups[len(search.plan.steps)]
        first = [layers[0] for layers in search.history].index(span[0])
        last = first + len(span) - 1
        score = search.score(first, last) if last > first else 0.0
        kept = 0 if search.rules.drops else None
        return Choice(first, last, kept, score, [SpanCandidate(first, last, score)])
