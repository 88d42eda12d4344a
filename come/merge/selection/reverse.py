"""The deepest span first."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, SpanScore
from come.stream.stream import LayerStream


@SELECTION.register
class Reverse(SpanScore):
    """Minus the position of the span's first layer: the deepest span is chosen first.

    Source: a baseline of arXiv 2403.03853 and others.
    """

    name = "reverse"
    paper = "2403.03853"
    source = "control, from the last layer on"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """-first."""
        return -float(first)
