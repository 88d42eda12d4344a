"""MKA's weights: layers that are more similar to all layers get a larger weight."""

from __future__ import annotations

import math
from functools import cache

from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan
from come.statistics.manifold import MIN_WINDOWS, diffusion_map, last_states, shared_information


@RETENTION.register
class MKA(RetentionRule):
    """Sigmoid weights of a pair of layers, from each layer's mean similarity to all layers.

        rho_a = sigmoid( s_a / (s_a + s_b) ),   rho_b = 1 - rho_a,
        s_l = mean_k S(l, k),   S the normalised pairwise information of the layers' outputs

    Source: arXiv 2406.16330; the sigmoid follows the published code. Differs from the paper in the
    normalisation of S (see `come.statistics.manifold`).
    """

    name = "mka"
    min_windows = MIN_WINDOWS
    paper = "2406.16330"
    source = "MKA, fusion ratios"

    def shares(self, span: LayerSpan) -> list[float]:
        """The two weights; 1/m each if the span has more than two layers."""
        if span.size != 2:
            return [1 / span.size] * span.size
        stream = span.stream

        @cache
        def outputs(layer: int):  # type: ignore[no-untyped-def]
            return diffusion_map(last_states(stream, layer + 1))

        def similarity(layer: int) -> float:
            found = [
                shared_information(outputs(layer), outputs(k)) for k in range(stream.num_layers)
            ]
            return sum(found) / len(found)

        first, second = similarity(span.first), similarity(span.last)
        total = first + second
        weight = 1 / (1 + math.exp(-first / total)) if total > 0 else 0.5
        return [weight, 1 - weight]
