"""Backward elimination of units by the error after the refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from come.linalg.gram import Gram, Map
from come.merge.joint_selection import joint_lambda, joint_work, select_units_jointly, unit_columns
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.work import SpanSize, Work
from come.setting import setting


@RETENTION.register
@dataclass(eq=False)
class Adaptive(RetentionRule):
    """Backward elimination: first removes the units whose removal increases the refit error least.

    All units of all layers of the span read the span's input and are the inputs of one stacked
    output projection W = [W_1 ... W_m]. W is solved by ridge regression to the reconstruction
    target (see `come.merge.refit.ridge`). While more than K units remain, those with the smallest
    growth of the penalised error are removed:

        growth_u = tr( W_u [ ((G + mu I)^-1)_uu ]^-1 W_u^T )

    u: the columns of a unit. KV groups are removed one at a time. Of the surplus MLP channels, a
    share of `rate` is removed per round, and W is solved again after every round. MLP channels are
    selected on the residual stream after the selected and solved attention.

    No exponent and no sensitivity is used: the elimination itself decides how many units each
    layer keeps. The shares (which weight output biases and per-head norms) are those of the kept
    MLP channels.

    Source: this project; the growth is that of the optimal brain surgeon, for groups of columns as
    in arXiv 2302.04089 (ZipLM). Units are selected with the norms of their own layers, but the
    merged layer has one norm: with `merge.norms=fold` both agree except for per-head norms. If the
    refit aligns input projections, units are selected with aligned ones. mu is the refit's lambda,
    or 0.1 for "auto", times the mean diagonal of G.
    """

    name = "adaptive"
    paper = ""
    source = "backward elimination on the refit's Gram matrix"
    needs_units = True
    uses_scores = False
    uses_targets = True

    rate: float = setting(
        0.3, "share of the surplus channels that leave in one round", above=0, most=1
    )

    def shares(self, group: LayerSpan) -> list[float]:
        """Each layer's share of the kept MLP channels."""
        return self.split(group).shares

    def split(self, group: LayerSpan) -> UnitAllocation:
        """The units that remain."""
        ratio = joint_lambda(group.refit)

        def choose(sums: Gram, initial: Map, count: int, size: int) -> list[int]:
            rate = self.rate if size == 1 else 0.0
            return eliminate(sums, initial, ratio * sums.mean_diagonal(), count, size, rate)

        def solve(sums: Gram, own: Map, columns: Tensor) -> Map:
            return sums.columns(columns).solve(own, ratio * sums.mean_diagonal())

        return select_units_jointly(group, choose, solve, group.refit.align)

    def work(self, size: SpanSize) -> Work:
        """The joint selection, and the elimination of channels."""
        return joint_work(size) + size.eliminated(size.width, size.channels)


def eliminate(
    sums: Gram, initial: Map, penalty: float, keep: int, size: int, rate: float
) -> list[int]:
    """Backward elimination of units of `size` adjacent columns until `keep` units remain.

    Args:
        sums: normal equations of all columns.
        initial: the map that the penalty refers to.
        penalty: absolute.
        keep: units to keep.
        size: columns of a unit.
        rate: share of the surplus that is removed per round; at least one unit is removed.

    Returns:
        Kept units, ascending.
    """
    alive = list(range(sums.width // size))
    factor = sums.factor(penalty)
    inverse = torch.cholesky_inverse(factor, out=factor)
    weight = inverse @ sums.pull(initial, penalty)
    while len(alive) > keep:
        growth = _growth(weight[: len(alive) * size], inverse, size)
        leaving = max(1, int((len(alive) - keep) * rate))
        order = torch.sort(growth, descending=True, stable=True).indices.tolist()
        stay = sorted(order[: len(alive) - leaving])
        columns = unit_columns(stay, size).to(inverse.device)
        constant = torch.arange(len(alive) * size, len(inverse), device=inverse.device)
        gone = unit_columns(sorted(order[len(alive) - leaving :]), size).to(inverse.device)
        inverse, weight = _without(inverse, weight, torch.cat([columns, constant]), gone)
        alive = [alive[i] for i in stay]
    return alive


def _without(inverse: Tensor, weight: Tensor, stay: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and solution of the equations of the remaining columns, by a Schur complement.

    (A_ss)^-1 = B_ss - B_sg B_gg^-1 B_gs and W_s = X_s - B_sg B_gg^-1 X_g, where B = A^-1 and X are
    those of all n columns, s the remaining and g the removed ones. A round costs n^2 g instead of
    n^3.
    """
    cross = inverse[stay[:, None], gone]
    factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
    rows = torch.cholesky_solve(torch.cat([cross.T, weight[gone]], dim=1), factor)
    smaller = inverse[stay[:, None], stay].addmm_(cross, rows[:, : len(stay)], alpha=-1)
    return smaller, weight[stay] - cross @ rows[:, len(stay) :]


def _growth(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """tr(W_u (inverse_uu)^-1 W_u^T) of every unit u; weight [columns, out], as solved."""
    count = len(weight) // size
    if size == 1:
        return weight.square().sum(dim=1) / inverse.diagonal()[:count]
    rows = weight.view(count, size, -1)
    spans = [slice(i * size, (i + 1) * size) for i in range(count)]
    blocks = torch.stack([inverse[span, span] for span in spans])
    return (rows * torch.cholesky_solve(rows, torch.linalg.cholesky(blocks))).sum(dim=(1, 2))
