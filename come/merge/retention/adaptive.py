"""The units that the error after the refit asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from come.linalg.gram import Gram, Map
from come.merge.joint_selection import joint_lambda, select_units_jointly, unit_columns
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import Group, UnitAllocation
from come.setting import setting


@RETENTION.register
@dataclass(eq=False)
class Adaptive(RetentionRule):
    """Backward elimination: the units without which the refit's error grows least go first.

    All units of all layers of the group read the group's input and drive one wide output map
    W = [W_1 ... W_m]; W is solved for by ridge regression to what the group did (see
    `come.merge.refit.ridge`), and while more than K units are left, those with the least
    growth of the penalised error leave:

        growth_u = tr( W_u [ ((G + mu I)^-1)_uu ]^-1 W_u^T )

    u: the columns of a unit. KV groups leave one at a time; of FFN channels `rate` of those that
    have to go leave in one round, then everything is solved for again. The FFN is asked on the
    residual stream that the chosen and solved attention leaves.

    No exponent and no sensitivity is used: how many units each layer keeps follows. The shares
    (which weigh output biases and per-head norms) are those of the kept FFN channels.

    Source: this project; the growth is that of optimal brain surgery, for groups of columns as in
    arXiv 2302.04089 (ZipLM). The merge reads one norm where units were asked with their own:
    exact with `merge.norms=fold` but for per-head norms. Where the refit aligns input maps, units
    are asked with aligned ones. mu is that of the refit, with "auto" 0.1.
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

    def shares(self, group: Group) -> list[float]:
        """Share of the kept FFN channels of every layer."""
        return self.split(group).shares

    def split(self, group: Group) -> UnitAllocation:
        """The units that are left."""
        ratio = joint_lambda(group.refit)

        def choose(sums: Gram, prior: Map, count: int, size: int) -> list[int]:
            rate = self.rate if size == 1 else 0.0
            return eliminate(sums, prior, ratio * sums.mean_diagonal(), count, size, rate)

        def solve(sums: Gram, own: Map, columns: Tensor) -> Map:
            return sums.columns(columns).solve(own, ratio * sums.mean_diagonal())

        return select_units_jointly(group, choose, solve, group.refit.align)


def eliminate(
    sums: Gram, prior: Map, penalty: float, keep: int, size: int, rate: float
) -> list[int]:
    """Backward elimination of units of `size` adjacent columns until `keep` are left.

    Args:
        sums: normal equations of all columns.
        prior: the map that the penalty refers to.
        penalty: absolute.
        keep: units to keep.
        size: columns of a unit.
        rate: share of the surplus that leaves in a round; at least one unit leaves.

    Returns:
        Kept units, ascending.
    """
    alive = list(range(sums.width // size))
    factor = sums.factor(penalty)
    inverse = torch.cholesky_inverse(factor, out=factor)
    weight = inverse @ sums.pull(prior, penalty)
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
    """Inverse and solution of the equations of the columns that stay, by a Schur complement.

    (A_ss)^-1 = B_ss - B_sg B_gg^-1 B_gs and W_s = X_s - B_sg B_gg^-1 X_g, B = A^-1 and X being
    those of all columns: a round costs n^2 g instead of n^3.
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
