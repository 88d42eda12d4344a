"""Magnitude of the layers' weights."""

from __future__ import annotations

import torch

from come.merge.selection.base import SELECTION, SpanScore
from come.stream.stream import LayerStream


@SELECTION.register
class Magnitude(SpanScore):
    """Sum of absolute weights of all linear maps of the span.

        sum_{layers} sum_W sum_ij |W_ij|

    Source: arXiv 2402.02834 (Shortened LLaMA), Mag.
    """

    name = "magnitude"
    paper = "2402.02834"
    source = "Shortened LLaMA, magnitude"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The sum, >= 0."""
        layers = range(first, last + 1)
        weights = [w for i in layers for w in stream.adapter.linear_weights(i, stream.block)]
        return sum(w.detach().abs().sum(dtype=torch.float64).item() for w in weights)
