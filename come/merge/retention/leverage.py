"""FlattenGPT's unit selection: ridge leverage scores."""

from __future__ import annotations

import torch
from torch import Tensor

from come.linalg.gram import Gram, Map
from come.merge.joint_selection import joint_lambda, joint_work, select_units_jointly
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.units import top_units
from come.merge.work import SpanSize, Work


@RETENTION.register
class Leverage(RetentionRule):
    """Keeps the units of the span whose activations the other units can replace least.

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

    def shares(self, group: LayerSpan) -> list[float]:
        """Each layer's share of the kept MLP channels."""
        return self.split(group).shares

    def split(self, group: LayerSpan) -> UnitAllocation:
        """The units with the highest leverage."""
        ratio = joint_lambda(group.refit)

        def choose(sums: Gram, initial: Map, count: int, size: int) -> list[int]:
            scores = leverage(sums, ratio * sums.mean_diagonal())
            return top_units(scores.view(-1, size).sum(dim=1), count)

        return select_units_jointly(group, choose, lambda sums, own, columns: own)

    def work(self, size: SpanSize) -> Work:
        """The joint selection, and one inverse."""
        return joint_work(size) + size.inverse(size.width)


def leverage(sums: Gram, penalty: float) -> Tensor:
    """diag( G (G + mu I)^-1 ) of the inputs, in [0, 1), float64; without the bias's constant."""
    gram = sums.gram[: sums.width, : sums.width]
    ridge = penalty * torch.eye(sums.width).to(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge))
    return 1 - penalty * inverse.diagonal()
