"""FlattenGPT's unit selection: ridge leverage scores."""

from __future__ import annotations

from come.linalg.equations import Equations, Map, unit_columns
from come.merge.joint_selection import joint_work, select_units_jointly
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.stacked_map import StackedMap
from come.merge.units import top_units
from come.merge.work import SpanSize, Work


@RETENTION.register
class Leverage(RetentionRule):
    """Keeps the units whose activations are hardest to reconstruct from the span's other units.

        l_u = sum_{j in u} [ G (G + mu I)^-1 ]_jj,    G = sum_t w_t f_t f_t^T

    f: the activations of all layers' units side by side, computed on the span's input, for MLP
    channels after the kept attention. One ranking over all layers keeps the K highest scores; ties
    go to the shallower layer, then to the lower index. The output projection has no influence.

    Source: arXiv 2602.08858 (FlattenGPT), for the MLP. Differs from the paper in ranking KV groups
    by the same score, and in the token weights (`merge.refit.weights`). mu is the refit's lambda,
    or 0.1 for "auto", times the mean diagonal of G.
    """

    name = "leverage"
    paper = "2602.08858"
    source = "FlattenGPT, ridge leverage scores"
    needs_units = True
    uses_scores = False
    uses_targets = True
    local = True

    def shares(self, span: LayerSpan) -> list[float]:
        """Each layer's share of the kept MLP channels."""
        return self.split(span).shares

    def split(self, span: LayerSpan) -> UnitAllocation:
        """The units with the highest leverage."""
        return select_units_jointly(span, self)

    def choose(
        self,
        sums: Equations,
        initial: StackedMap,
        penalty: float,
        keep: int,
        size: int,
        solves: bool,
    ) -> tuple[list[int], Map | None]:
        """The units with the largest sum of leverages, and their unchanged output projection."""
        units = top_units(sums.leverage(penalty).view(-1, size).sum(dim=1), keep)
        return units, initial.columns(unit_columns(units, size)) if solves else None

    def work(self, size: SpanSize) -> Work:
        """The joint selection, and one inverse."""
        return joint_work(size) + size.inverse(size.width, size.itemsize)
