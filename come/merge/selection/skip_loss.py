"""SLEB's score: the loss without the span."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from come.merge.selection.base import SELECTION, SpanScore
from come.stream.candidates import Candidate, losses, together
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
        return self.scores(stream, [(first, last)])[0]

    def scores(self, stream: LayerStream, spans: Sequence[tuple[int, int]]) -> list[float]:
        """The losses, nats per token, >= 0."""
        found: list[float] = []
        for batch in together(stream, spans):
            candidates = [
                Candidate(first, _without(stream, first, last), last + 1) for first, last in batch
            ]
            found += losses(stream, candidates)
        return found


def _without(stream: LayerStream, first: int, last: int) -> list[tuple[int, nn.Module]]:
    """The route from boundary `first` to last + 1 that skips the blocks of these layers."""
    if stream.block == "layer":
        return []
    adapter = stream.adapter
    return [
        (index, adapter.copy_layer(index, adapter.zeroed(index, stream.block)))
        for index in range(first, last + 1)
    ]
