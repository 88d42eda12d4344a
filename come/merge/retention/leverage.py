"""FlattenGPT's choice of units: ridge leverage scores."""

from __future__ import annotations

import torch
from torch import Tensor

from come.linalg.gram import Gram, Map
from come.merge.joint_selection import joint_lambda, select_units_jointly
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import Group, UnitAllocation
from come.merge.units import top_units


@RETENTION.register
class Leverage(RetentionRule):
    """Keeps the units of the group whose activations the others replace least.

        l_u = sum_{j in u} [ G (G + mu I)^-1 ]_jj,    G = sum_t w_t f_t f_t^T

    f: the activations of all layers' units side by side, on the group's input; behind the attention
    that is kept where they are FFN channels. In one ranking over all layers the K highest are kept
    (of equal scores the shallower layer, then the lower index). What the units drive plays no part.

    Source: arXiv 2602.08858 (FlattenGPT), for the FFN. Differs in that KV groups are ranked by the
    same score, and in the weights of tokens (`merge.refit.weights`). mu is that of the refit, with
    "auto" 0.1.
    """

    name = "leverage"
    paper = "2602.08858"
    source = "FlattenGPT, ridge leverage scores"
    needs_units = True
    uses_scores = False
    uses_targets = True

    def shares(self, group: Group) -> list[float]:
        """Share of the kept FFN channels of every layer."""
        return self.split(group).shares

    def split(self, group: Group) -> UnitAllocation:
        """The units with the highest leverage."""
        ratio = joint_lambda(group.refit)

        def choose(sums: Gram, prior: Map, count: int, size: int) -> list[int]:
            scores = leverage(sums, ratio * sums.mean_diagonal())
            return top_units(scores.view(-1, size).sum(dim=1), count)

        return select_units_jointly(group, choose, lambda sums, own, columns: own)


def leverage(sums: Gram, penalty: float) -> Tensor:
    """diag( G (G + mu I)^-1 ) of the inputs, in [0, 1), float64; a constant input is left out."""
    gram = sums.gram[: sums.width, : sums.width]
    ridge = penalty * torch.eye(sums.width).to(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge))
    return 1 - penalty * inverse.diagonal()
