"""CoMe-P: the allocation with the lowest calibration loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from come.merge.retention.base import RETENTION, RetentionRule, with_units
from come.merge.span import LayerSpan, UnitAllocation
from come.setting import setting


@RETENTION.register
@dataclass(eq=False)
class Posterior(RetentionRule):
    """Tries allocations of the span and keeps the one with the lowest calibration cross-entropy.

        rho = argmin over { k / n : k in N^m, sum k = n } of L(merged by rho),   n = granularity

    For m = 2 these are r = 0, 1/20, ..., 1, as in the paper. For m > 2 the simplex is searched
    greedily from the equal allocation: the best move of one step between two layers is taken until
    no move helps (the paper does not say how). Allocations that keep the same units are evaluated
    once. Ties go to the first one tried.

    Source: arXiv 2510.15304, CoMe-P. Every trial runs the merged layer, the layers after the span
    and the LM head: about 20 forward passes through these layers per merge.
    """

    name = "posterior"
    paper = "2510.15304"
    source = "CoMe-P, posterior retention"
    trials = True

    granularity: int = setting(20, "steps of a share from 0 to 1", least=1)

    def shares(self, span: LayerSpan) -> list[float]:
        """The best shares found."""
        return self.split(span).shares

    def split(self, span: LayerSpan) -> UnitAllocation:
        """The best allocation found."""
        if span.size == 1:
            return with_units([1.0], span)
        losses: dict[str, float] = {}

        def tried(counts: Sequence[tuple[int, ...]]) -> list[float]:
            """The losses of allocations; those that keep the same units are evaluated once."""
            splits = [with_units([n / self.granularity for n in given], span) for given in counts]
            keys = [str(split.kept or split.shares) for split in splits]
            new = {key: split for key, split in zip(keys, splits, strict=True) if key not in losses}
            for key, found in zip(new, span.losses(list(new.values())), strict=True):
                losses[key] = math.inf if math.isnan(found) else found
            return [losses[key] for key in keys]

        def best_of(counts: Sequence[tuple[int, ...]]) -> tuple[float, tuple[int, ...]]:
            found = tried(counts)
            lowest = found.index(min(found))
            return found[lowest], counts[lowest]

        if span.size == 2:
            loss, best = best_of([(k, self.granularity - k) for k in range(self.granularity + 1)])
        else:
            loss, best = best_of([self._start(span.size)])
            while True:
                lower, nearest = best_of(list(_moves(best)))
                if lower >= loss:
                    break
                loss, best = lower, nearest
        if not math.isfinite(loss):
            raise ValueError(
                "merge.retention=posterior: the loss of every split that was tried is not finite; "
                "try model.dtype=float32 or bfloat16"
            )
        return with_units([count / self.granularity for count in best], span)

    def _start(self, size: int) -> tuple[int, ...]:
        """The most equal counts; the first layers get the remainder."""
        each, left = divmod(self.granularity, size)
        return tuple(each + (i < left) for i in range(size))


def _moves(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All counts that differ by one step, moved from one layer to another."""
    for source in range(len(counts)):
        for target in range(len(counts)):
            if source != target and counts[source] > 0:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)
