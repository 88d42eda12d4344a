"""Groups given by hand."""

from __future__ import annotations

from collections.abc import Sequence

from come.merge.plan import GroupCandidate
from come.merge.schedules.base import SCHEDULES, Choice, Schedule, Search


@SCHEDULES.register
class Fixed(Schedule):
    """The groups of `merge.groups`, in their order; a drop keeps the first layer of each.

    The model is measured again after every merge, as by the progressive schedule.

    Args:
        groups: original layers of each group.
    """

    name = "fixed"
    paper = ""
    source = "given by hand"
    ranks = False

    def __init__(self, groups: Sequence[Sequence[int]] = ()) -> None:
        self.groups = groups

    def choose(self, search: Search) -> Choice:
        """The first group that has not been merged, with its score for the record."""
        merged = [span for span in search.history if len(span) > 1]
        group = next(group for group in self.groups if list(group) not in merged)
        first = [span[0] for span in search.history].index(group[0])
        last = first + len(group) - 1
        score = search.score(search.origins[first], search.origins[last])
        kept = 0 if search.rules.drops else None
        return Choice(first, last, kept, score, [GroupCandidate(first, last, score)])
