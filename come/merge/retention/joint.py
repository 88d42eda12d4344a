"""One ranking of all units of the group."""

from __future__ import annotations

import torch

from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import Group, UnitAllocation
from come.merge.units import top_units
from come.models.adapter import Unit


@RETENTION.register
class Joint(RetentionRule):
    """Keeps the most sensitive units of the group, whichever layer they come from.

        kept = the K highest of S_lj / sum_k |S_lk| over all layers l of the group

    Scores are shares of their layer's total, so that layers whose hidden states are larger do not
    win by size alone. KV groups and FFN channels are ranked apart, so their splits may differ; the
    reported share of a layer (which weighs output biases and per-head norms) is its share of the
    kept FFN channels, or of the KV groups where attention alone is merged. Of equal scores the
    shallower layer, then the lower index is kept.

    Source: this project.
    """

    name = "joint"
    paper = ""
    source = "one ranking of all units"
    needs_units = True

    def shares(self, group: Group) -> list[float]:
        """Share of the kept units of every layer."""
        return self.split(group).shares

    def split(self, group: Group) -> UnitAllocation:
        """The highest of all units of the group."""
        assert group.scores is not None, "joint retention ranks units"
        kept: dict[Unit, list[list[int]]] = {}
        for unit, layers in group.scores().items():
            count = len(layers[0])
            ranked = torch.cat([layer / layer.abs().sum().clamp_min(1e-300) for layer in layers])
            best = top_units(ranked, count)
            kept[unit] = [
                [i - count * layer for i in best if i // count == layer]
                for layer in range(len(layers))
            ]
        counted = kept["kv_group" if group.stream.block == "attention" else "channel"]
        total = sum(map(len, counted))
        return UnitAllocation([len(layer) / total for layer in counted], kept)
