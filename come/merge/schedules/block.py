"""All layers to remove, in one contiguous span."""

from __future__ import annotations

from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search


@SCHEDULES.register
class Block(Schedule):
    """Chooses the one contiguous span with the lowest score whose removal reaches the target.

    `merge.m` is ignored. Each depth of `merge.save_at` is searched separately from the dense model.

    Source: arXiv 2403.17887 (UIDL).
    """

    name = "block"
    paper = "2403.17887"
    source = "UIDL, one contiguous block"
    nested = False
    single_span = True

    def choose(self, search: Search) -> Choice:
        """The span."""
        return search.lowest(search.rules.spans(search.history, search.target))
