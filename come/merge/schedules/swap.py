"""Backward elimination of layers by the loss, then swaps of dropped and kept layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from come.merge.combination import Combination
from come.merge.schedules.base import SCHEDULES, SetSchedule
from come.merge.search import Search
from come.merge.selection.skip_loss import check_skip_loss
from come.setting import setting


@SCHEDULES.register
@dataclass(eq=False)
class Swap(SetSchedule):
    """Drops layers one by one by the calibration loss, then swaps dropped for kept layers.

        elimination:  S <- S + argmin_i L(S + i), until S is large enough
        a round:      for every i in S, in the order of their drops, k = argmin_k L(S - i + k);
                      S <- S - i + k if that is below L(S)

    L(S): calibration loss without the layers of S. Rounds end after `rounds`, or after one without
    a swap. The score of every step is L(S) of the whole set. Every depth of `merge.save_at` is
    searched separately, and no loss is measured twice.

    Source: the elimination is that of arXiv 2402.09025 (SLEB), which `rounds=0` leaves as it is.
    Swaps of pruned and kept structures are the local search of arXiv 2403.12983 (OSSCAR). Differs
    from that paper in what is swapped (there channels and heads inside a layer) and in the
    objective (there the squared error of that layer's output, with updates of low rank).
    """

    name = "swap"
    paper = "2403.12983"
    source = "SLEB's elimination, with swaps as in OSSCAR"
    nested = False

    rounds: int = setting(2, "most rounds of swaps after the elimination", least=0)

    def check(self, method: Combination) -> None:
        """Raises ValueError for components that it would not use."""
        super().check(method)
        check_skip_loss(self.name, method)

    def passes(self, num_layers: int, target: int) -> tuple[int, int]:
        """The losses of elimination and all rounds, if a dropped layer is the first one."""
        sizes = range(1, num_layers - target + 1)
        eliminated = sum((num_layers - size + 1) * (num_layers - size) for size in sizes)
        heads = sum(num_layers - size + 1 for size in sizes)
        swaps = self.rounds * (num_layers - target) * target
        return eliminated + swaps * target, heads + swaps

    def removed(self, search: Search, count: int) -> list[tuple[int, float]]:
        """The layers of the set, ascending, each with L(S)."""
        rules, depth = search.rules, search.stream.num_layers
        free = range(rules.protect_first, depth - rules.protect_last)

        def best(others: Sequence[int]) -> tuple[float, int]:
            """The layer to drop beside the others, and the loss without all of them."""
            kept = [layer for layer in free if layer not in others]
            sets = {tuple(sorted([*others, layer])): layer for layer in kept}
            allowed = rules.allowed_drops(list(sets), depth)
            found = search.losses(allowed)
            loss = min(found)
            return loss, sets[allowed[found.index(loss)]]

        dropped: list[int] = []
        loss = 0.0
        while len(dropped) < count:
            loss, layer = best(dropped)
            dropped.append(layer)
        for _ in range(self.rounds):
            before = list(dropped)
            for place, layer in enumerate(before):
                others = [other for other in dropped if other != layer]
                lower, found = best(others)
                if lower < loss:
                    loss, dropped[place] = lower, found
            if dropped == before:
                break
        return [(layer, loss) for layer in sorted(dropped)]
