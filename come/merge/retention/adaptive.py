"""Backward elimination of units by the error after the refit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from come.linalg.equations import Equations, Map, eliminate, unit_columns
from come.merge.joint_selection import joint_work, select_units_jointly
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.stacked_map import StackedMap
from come.merge.work import SpanSize, Work
from come.setting import setting

TRIAL_RATE = 0.7  # rate of trial merges; it changes their scores by about 1% (experiments/LOG.md)


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
    share of `rate` is removed per round, at least 1% of K, and W is solved again after every round.
    MLP channels are selected on the residual stream after the selected and solved attention.

    No exponent and no sensitivity is used: the elimination itself decides how many units each
    layer keeps. The shares (which weight output biases and per-head norms) are those of the kept
    MLP channels.

    Source: this project; the growth is that of the optimal brain surgeon, for groups of columns as
    in arXiv 2302.04089 (ZipLM). Units are selected with the norms of their own layers, but the
    merged layer has one norm: with `merge.norms=fold` both agree except for per-head norms. If the
    refit aligns input projections, units are selected with aligned ones. mu is the refit's lambda,
    or 0.1 for "auto", times the mean diagonal of G. More than `tokens` tokens hardly change the
    choice (experiments/LOG.md).
    """

    name = "adaptive"
    paper = ""
    source = "backward elimination on the refit's Gram matrix"
    needs_units = True
    uses_scores = False
    uses_targets = True
    solves = True
    local = True

    rate: float = setting(
        0.3, "share of the surplus channels that leave in one round", above=0, most=1
    )

    tokens: int | None = setting(
        8192,
        "calibration tokens that the choice reads, from the first; null for all",
        kind=int,
        least=1,
        optional=True,
    )

    def shares(self, span: LayerSpan) -> list[float]:
        """Each layer's share of the kept MLP channels."""
        return self.split(span).shares

    def split(self, span: LayerSpan) -> UnitAllocation:
        """The kept units."""
        return select_units_jointly(span.of_tokens(self.tokens), self)

    def trial_split(self, span: LayerSpan) -> UnitAllocation:
        """The kept units after an elimination in fewer rounds, and their solution."""
        rule = replace(self, rate=max(self.rate, TRIAL_RATE))
        return select_units_jointly(span.of_tokens(self.tokens), rule, solves=True)

    def choose(
        self,
        sums: Equations,
        initial: StackedMap,
        penalty: float,
        keep: int,
        size: int,
        solves: bool,
    ) -> tuple[list[int], Map | None]:
        """The kept units after the elimination, and their solution."""
        channels = size == 1
        rate = self.rate if channels else 0.0
        units, left = eliminate(sums, initial.read(), penalty, keep, size, rate, consume=channels)
        if not solves:
            return units, None
        columns = unit_columns(units, size)
        own = initial.columns(columns)
        if channels:
            return units, left.solution(own)
        columns = columns.to(own.weight.device)
        return units, sums.columns(columns).solve(own, penalty, consume=True)

    def work(self, size: SpanSize) -> Work:
        """The joint selection, and the elimination of channels."""
        size = replace(size, tokens=min(size.tokens, self.tokens or size.tokens))
        return joint_work(size) + size.eliminated(size.width, size.kept or size.channels)
