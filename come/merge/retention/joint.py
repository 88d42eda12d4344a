"""One ranking of all units of the span."""

from __future__ import annotations

import torch

from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.units import by_layer, top_units
from come.models.layout import Unit


@RETENTION.register
class Joint(RetentionRule):
    """Keeps the most sensitive units of the span, regardless of their layer.

        kept = the K highest of S_lj / sum_k |S_lk| over all layers l of the span

    Scores are divided by their layer's total, so that layers with larger hidden states do not win
    by magnitude alone. Each kind of unit is ranked separately, so their allocations may differ. The
    reported share of a layer (which weights output biases and per-head norms) is its share of the
    kept units of the last merged sublayer. Ties go to the shallower layer, then to the lower index.

    Source: this project.
    """

    name = "joint"
    paper = ""
    source = "one ranking of all units"
    needs_units = True

    def shares(self, span: LayerSpan) -> list[float]:
        """Each layer's share of the kept units."""
        return self.split(span).shares

    def split(self, span: LayerSpan) -> UnitAllocation:
        """The units with the highest normalised scores in the span."""
        assert span.scores is not None, "joint retention ranks units"
        kept: dict[Unit, list[list[int]]] = {}
        for unit, layers in span.scores.items():
            ranked = torch.cat([layer / layer.abs().sum().clamp_min(1e-300) for layer in layers])
            best = top_units(ranked, span.unit_counts[unit])
            kept[unit] = by_layer(best, len(layers[0]), len(layers))
        counted = kept[span.layout.of(span.stream.block)[-1].unit]
        total = sum(map(len, counted))
        return UnitAllocation([len(layer) / total for layer in counted], kept)
