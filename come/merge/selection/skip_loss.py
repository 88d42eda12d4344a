"""SLEB's score: the loss without the span."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, SpanScore
from come.stream.stream import LayerStream


@SELECTION.register
class SkipLoss(SpanScore):
    """Calibration loss of the model without the span.

    Mean cross-entropy, nats per predicted token. Each score runs the layers after the span, from
    the boundary before it, and the LM head. Every merge changes all scores.

    Source: arXiv 2402.09025 (SLEB); there the span is one layer.
    """

    name = "skip_loss"
    paper = "2402.09025"
    source = "SLEB, metric of a block"
    local = False

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The loss, nats per token, >= 0."""
        downstream = stream.route(last + 1, stream.num_layers - 1)
        return stream.loss(first, [*stream.route_without(first, last), *downstream])
