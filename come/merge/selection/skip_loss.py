"""SLEB's score: the loss without the span."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from come.merge.combination import Combination
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
        return losses_without(stream, [range(first, last + 1) for first, last in spans])


def losses_without(stream: LayerStream, sets: Sequence[Sequence[int]]) -> list[float]:
    """Calibration loss of the stream's model without each set of layers.

    Args:
        stream: the layer stream; all boundaries must be valid.
        sets: positions in the stream's model, ascending; without any, the model itself.

    Returns:
        Mean cross-entropy, nats per predicted token, >= 0.
    """
    found: list[float] = []
    for some in together(stream, sets):
        found += losses(stream, [_candidate(stream, removed) for removed in some])
    return found


def check_skip_loss(schedule: str, method: Combination) -> None:
    """Raises ValueError unless the selection is the loss that the schedule measures itself."""
    if method.selection.name != SkipLoss.name:
        raise ValueError(
            f"merge.schedule={schedule} compares losses without layers; merge.selection="
            f"{method.selection.name} is not possible with it: choose merge.selection=skip_loss"
        )


def _candidate(stream: LayerStream, removed: Sequence[int]) -> Candidate:
    """The model without the blocks of these layers."""
    if not removed:
        return Candidate(stream.num_layers, [], stream.num_layers)
    return Candidate(removed[0], _without(stream, removed), removed[-1] + 1)


def _without(stream: LayerStream, removed: Sequence[int]) -> list[tuple[int, nn.Module]]:
    """The route from the first to the last of the removed layers, without their blocks."""
    adapter, found = stream.adapter, list[tuple[int, nn.Module]]()
    for index in range(removed[0], removed[-1] + 1):
        if index not in removed:
            found += stream.route(index, index)
        elif stream.block != "layer":
            zeroed = adapter.zeroed(index, stream.block)
            found.append((index, adapter.copy_layer(index, zeroed)))
    return found
