"""All layers that have to go, in one block."""

from __future__ import annotations

from come.merge.schedules.base import SCHEDULES, Choice, Schedule, Search


@SCHEDULES.register
class Block(Schedule):
    """The one contiguous span with the lowest score whose removal reaches the target.

    `merge.m` is not read. Other depths of `merge.save_at` are found from the dense model, each by
    itself.

    Source: arXiv 2403.17887 (UIDL).
    """

    name = "block"
    paper = "2403.17887"
    source = "UIDL, one contiguous block"
    nested = False
    single_span = True

    def choose(self, search: Search) -> Choice:
        """The block."""
        return search.lowest(search.rules.spans(search.history, search.target))
