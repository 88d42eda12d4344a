"""The set of layers whose removal costs least, from the costs of single layers and of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch

from come.linalg.subsets import best_consistent_subset, consistent_cost
from come.merge.combination import Combination
from come.merge.schedules.base import SCHEDULES, SetSchedule
from come.merge.search import Search
from come.merge.selection.skip_loss import check_skip_loss
from come.progress import ProgressBar
from come.stream.candidates import Candidate, losses, together
from come.stream.stream import LayerStream


@SCHEDULES.register
@dataclass(eq=False)
class Pairwise(SetSchedule):
    """Drops the set of layers with the least quadratic cost.

        E(S) = sum_{i in S} c_i + sum_{i < j in S} (c_ij - c_i - c_j)
        L(S) = L + max(E(S), max_{i < j in S} c_ij)

    c_i and c_ij: growth of the calibration loss L without layer i, and without layers i and j, so
    that L(S) is exact for one and two layers. Losses without layers that a model needs saturate,
    and then the sum falls below the loss of a pair in the set, or below 0; so no set counts as
    better than its worst pair. The minimum over all sets of the needed size is found by enumeration
    (see `come.linalg.subsets`). The score of every step is L(S) of the whole set.
    Every depth of `merge.save_at` is searched separately, with the same losses.

    Source: arXiv 2602.00161, block removal as a constrained binary quadratic problem (an Ising
    model of fixed magnetisation). Differs from the paper in the coefficients: there they come from
    forward and backward passes over a few parameters, here from the losses without one and two
    layers, with the bound by the worst pair; and in the solver: there any, at least approximate,
    Ising solver.
    """

    name = "pairwise"
    paper = "2602.00161"
    source = "block removal as a binary quadratic problem"
    nested = False

    def check(self, method: Combination) -> None:
        """Raises ValueError for components that it would not use."""
        super().check(method)
        check_skip_loss(self.name, method)

    def passes(self, num_layers: int, target: int) -> tuple[int, int]:
        """Single layers from the boundary before them; pairs from the states without the first."""
        singles = num_layers * (num_layers - 1) // 2
        pairs = sum(num_layers - 1 - j for _, j in combinations(range(num_layers), 2))
        prefixes = sum(num_layers - 2 - i for i in range(num_layers - 1))
        heads = 1 + num_layers + num_layers * (num_layers - 1) // 2
        return singles + pairs + prefixes, heads

    def removed(self, search: Search, count: int) -> list[tuple[int, float]]:
        """The layers of the best set, ascending, each with L(S)."""
        rules, stream = search.rules, search.stream.unshared()
        free = list(range(rules.protect_first, stream.num_layers - rules.protect_last))
        (dense,) = search.losses([()])
        alone = torch.tensor(search.losses([(i,) for i in free]), dtype=torch.float64) - dense
        both = torch.zeros(len(free), len(free), dtype=torch.float64)
        total = len(free) * (len(free) - 1) // 2
        with ProgressBar(total=total, desc="pairs of layers", shown=stream.progress) as bar:
            for row, first in enumerate(free[:-1]):
                pairs = [(first, other) for other in free[row + 1 :]]
                found = search.losses_by(partial(losses_without_pairs, stream), pairs)
                growth = torch.tensor(found, dtype=torch.float64) - dense
                both[row, row + 1 :] = growth - alone[row] - alone[row + 1 :]
                bar.update(len(pairs))
        both = both + both.T
        best = best_consistent_subset(alone, both, count)
        loss = dense + consistent_cost(alone, both, best)
        return [(free[index], loss) for index in best]


@torch.no_grad()
def losses_without_pairs(stream: LayerStream, pairs: Sequence[Sequence[int]]) -> list[float]:
    """Calibration loss without both layers of each pair.

    Args:
        stream: the layer stream; all boundaries must be valid.
        pairs: one first layer, and second layers after it, ascending.

    Returns:
        Mean cross-entropy, nats per predicted token, >= 0.
    """
    found: list[float] = []
    first, others = pairs[0][0], [other for _, other in pairs]
    states = [stream.boundary(first, rows) for rows in stream.batches]
    reached = first + 1  # the layer that `states` enter
    for some in together(stream, others):
        candidates = []
        for other in some:
            for index in range(reached, other):
                states = [stream.run(index, each) for each in states]
            reached = other
            candidates.append(Candidate(other, [], other + 1, states))
        found += losses(stream, candidates)
    return found
