"""First-order Taylor importance of the layers' weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from come.merge.selection.base import SELECTION, SpanScore
from come.statistics.gradients import backward, trainable
from come.stream.stream import LayerStream


@SELECTION.register
@dataclass(eq=False)
class Taylor(SpanScore):
    """First-order change of the loss if the span's weights were zero, weight by weight.

        sum_{layers} sum_W sum_ij | W_ij dL/dW_ij |

    W: all linear maps of a layer; L: the mean loss over all calibration tokens. One backward pass
    of the stream scores all layers and holds the gradients of one layer at a time.

    Source: arXiv 2402.02834 (Shortened LLaMA), Taylor.
    """

    name = "taylor"
    paper = "2402.02834"
    source = "Shortened LLaMA, first-order Taylor"
    local = False

    _layers: dict[int, float] = field(init=False, repr=False, default_factory=dict)

    def prepare(self, stream: LayerStream) -> None:
        """Computes the scores of all layers from their gradients."""
        adapter = stream.adapter
        self._layers.clear()
        with trainable(adapter, range(adapter.num_layers)):
            weights_of = partial(adapter.linear_weights, block=stream.block)
            for index, gradients in backward(stream, 0, weights_of):
                weights = weights_of(index)
                self._layers[index] = sum(
                    (weight.detach() * gradient).abs().sum(dtype=torch.float64).item()
                    for weight, gradient in zip(weights, gradients, strict=True)
                )

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The sum, nats, >= 0."""
        return sum(self._layers[index] for index in range(first, last + 1))
