"""Spans of several sizes, by their score per removed layer."""

from __future__ import annotations

from come.merge.plan import SpanCandidate
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search


@SCHEDULES.register
class Mixed(Schedule):
    """Takes the span of 2 to `merge.m` layers with the lowest score per removed layer.

        argmin_{a, b}  score(a, b) / (b - a),    b - a + 1 in 2 .. m

    Scores are those of the current model, before every merge. A span is no larger than the next
    depth of `merge.save_at`, or the target, allows, so that every such depth is reached.

    Source: this project.

    Raises:
        ValueError: no span leads to the depths of `merge.save_at`.
    """

    name = "mixed"
    paper = ""
    source = "score for each layer saved"
    variable_size = True
    uses_scores = False

    def choose(self, search: Search) -> Choice:
        """The eligible span with the lowest score per removed layer."""
        stop = search.stops[0]
        spans = search.rules.spans(search.history, search.target, stop)
        if not spans:
            raise ValueError(
                f"no span of layers is left that leads to {stop} and then {search.target} "
                "layers; leave depths of merge.save_at out, or set merge.allow_remerge=true"
            )
        return search.chosen([SpanCandidate(a, b, search.score(a, b) / (b - a)) for a, b in spans])
