"""The set of spans with the lowest total cost, by dynamic programming over span costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from math import prod
from statistics import fmean

from come.merge.combination import Combination
from come.merge.plan import MergeStep, SpanCandidate
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search

Bounds = tuple[int, int]  # first and last layer
Cost = Callable[[int, int], float | None]  # of the span first..last; None if it must not merge
State = tuple[int, ...]  # layers removed so far for each remaining depth
Found = tuple[float, tuple[tuple[int, Bounds], ...]]  # total cost; each span with its depth's index
LARGEST = 1 << 17  # most dynamic-programming states at one layer


@SCHEDULES.register
class OptimalPartition(Schedule):
    """Chooses all spans for all depths together, such that their total cost is lowest.

        argmin  sum_depths sum_{a..b merged at this depth} c(a, b)

    over sets of spans of 2 to `merge.m` layers that reach every depth of `merge.save_at` and the
    target; the spans of one depth stay merged at the next. Solved by dynamic programming.
    c(i, i + 1): the selection's score of two layers of the dense model; it hardly depends on what
    is merged elsewhere. c of a larger span: approximated by the sum over its pairs
    (experiments/LOG.md). The spans of a depth are merged in depth order, shallowest first, so that
    each one is fitted to the hidden states that it actually receives.

    If the selection uses a shortlist, c is the score of a trial merge, for at least twice as many
    pairs as there are layers to remove; other pairs are not merged. Larger spans are tried when
    the best set contains them, until all spans of the set have been tried. Sums for untried spans
    are scaled by the mean ratio of trial score to sum over the tried ones.

    Source: this project.

    Raises:
        ValueError: no set of spans reaches the depths, or there are too many depths.
    """

    name = "optimal_partition"
    former = "cheapest"
    paper = ""
    source = "least sum of span costs"
    variable_size = True
    plans_ahead = True

    @classmethod
    def check_depths(cls, num_layers: int, depths: Collection[int]) -> None:
        """Raises ValueError if planning all depths together would take too long."""
        ahead = sorted(set(depths), reverse=True)
        if prod(a - b + 1 for a, b in pairwise([num_layers, *ahead])) > LARGEST:
            raise ValueError(
                "merge.schedule=optimal_partition plans all depths together, and merge.save_at has "
                f"too many: {', '.join(map(str, ahead))}; leave some out, or choose "
                "merge.schedule=mixed merge.selection=angular"
            )

    def check(self, method: Combination) -> None:
        """Raises ValueError for `merge.allow_remerge`: costs are those of the dense model."""
        super().check(method)
        if method.allow_remerge:
            raise ValueError(
                f"merge.schedule={self.name} adds costs of the dense model's layers, so "
                "merge.allow_remerge=true is not possible with it; choose merge.schedule=mixed "
                "merge.selection=angular"
            )

    def choose(self, search: Search) -> Choice:
        """The first span of the next depth's set."""
        history, rules, depth = search.history, search.rules, len(search.history)
        saved = [a - b for a, b in pairwise([depth, *search.stops])]
        layers = sum(map(len, history))
        own = [span[0] for span in history]
        free = [
            len(span) == 1 and rules.protect_first <= i < depth - rules.protect_last
            for i, span in enumerate(history)
        ]
        costs = known_costs(search.steps, layers)
        waiting = [
            (i, i + 1)
            for i in range(depth - 1)
            if free[i] and free[i + 1] and rules.alike(history, i, i + 1)
            if (own[i], own[i + 1]) not in costs
        ]
        count = len(waiting)
        if search.shortlist:
            count = max(search.shortlist, 2 * (layers - search.target))
        known = sum(last - first == 1 for first, last in costs)
        missing = _ranked(search, waiting)[: count - known] if count > known else []
        measured: list[SpanCandidate] = []
        while True:
            waiting = [pair for pair in waiting if pair not in missing]
            found = search.tried(missing) if search.shortlist else search.scored(missing)
            measured += found
            costs |= {(own[c.first], own[c.last]): c.score for c in found}
            estimated = estimate(costs)

            def cost(first: int, last: int, of: Cost = estimated) -> float | None:
                return of(own[first], own[last]) if all(free[first : last + 1]) else None

            sets = optimal_partition(cost, depth, rules.m, saved)
            if sets is None:
                missing = _ranked(search, waiting)[:count]
                if not missing:
                    raise ValueError(
                        "no spans are left that lead to "
                        f"{', '.join(map(str, search.stops))} layers; leave depths of "
                        "merge.save_at out"
                    )
                continue
            missing = [g for part in sets for g in part if (own[g[0]], own[g[1]]) not in costs]
            if not missing or not search.shortlist:
                break
        first, last = sets[0][0]
        score = cost(first, last)
        assert score is not None
        return Choice(first, last, None, score, measured or [SpanCandidate(first, last, score)])


def _ranked(search: Search, pairs: list[Bounds]) -> list[Bounds]:
    """The pairs; with a shortlist, sorted by score, lowest first."""
    if not search.shortlist:
        return pairs
    order = sorted(search.scored(pairs), key=lambda candidate: candidate.score)
    return [(c.first, c.last) for c in order]


def known_costs(steps: Sequence[MergeStep], num_layers: int) -> dict[Bounds, float]:
    """Costs measured before earlier merges, for spans of unmerged original layers.

    Args:
        steps: the merges so far.
        num_layers: layers of the dense model.
    """
    history, known = [[i] for i in range(num_layers)], {}
    for step in steps:
        for c in step.candidates:
            if all(len(span) == 1 for span in history[c.first : c.last + 1]):
                known[history[c.first][0], history[c.last][0]] = c.score
        joined = [layer for span in history[step.first : step.last + 1] for layer in span]
        history[step.first : step.last + 1] = [joined]
    return known


def estimate(costs: Mapping[Bounds, float]) -> Cost:
    """Returns the cost function of spans: the measured cost, or an estimate from the pairs.

    The estimate is the sum over the span's pairs, times the mean ratio of measured cost to such a
    sum over all measured spans. It is None if the cost of one of the pairs is unknown.
    """

    def by_pairs(first: int, last: int) -> float | None:
        found = [costs[pair] for pair in pairwise(range(first, last + 1)) if pair in costs]
        return sum(found) if len(found) == last - first else None

    stretches = [
        score / total
        for (first, last), score in costs.items()
        if last - first > 1 and (total := by_pairs(first, last))
    ]
    stretch = fmean(stretches) if stretches else 1.0

    def cost(first: int, last: int) -> float | None:
        if (first, last) in costs:
            return costs[first, last]
        total = by_pairs(first, last)
        return None if total is None else stretch * total

    return cost


def optimal_partition(
    cost: Cost, depth: int, m: int, saved: Sequence[int]
) -> list[list[Bounds]] | None:
    """The spans with the lowest total cost that lead from `depth` layers to each depth in turn.

    Args:
        cost: cost of the span of layers first..last; None if it must not be merged.
        depth: number of layers.
        m: layers of the largest span.
        saved: layers to remove for each of the depths. The cost of a span counts n times if it is
            merged at the first of n depths, and once if it is merged at the last.

    Returns:
        The spans of each depth, ascending; None if there are no such sets.
    """
    table: list[dict[State, Found]] = [{} for _ in range(depth + 1)]
    table[0][(0,) * len(saved)] = 0.0, ()

    def reach(end: int, state: State, found: Found) -> None:
        if state not in table[end] or found[0] < table[end][state][0]:
            table[end][state] = found

    for first in range(depth):
        prices = [(last, cost(first, last)) for last in range(first + 1, min(first + m, depth))]
        spans = [(last, price) for last, price in prices if price is not None]
        for state, (total, chosen) in table[first].items():
            reach(first + 1, state, (total, chosen))
            for last, price in spans:
                for at, size in enumerate(saved):
                    reached = state[at] + last - first
                    if reached <= size:
                        after = (*state[:at], reached, *state[at + 1 :])
                        spent = total + (len(saved) - at) * price
                        reach(last + 1, after, (spent, (*chosen, (at, (first, last)))))
        table[first] = {}
    best = table[depth].get(tuple(saved))
    if best is None:
        return None
    return [[span for at, span in best[1] if at == part] for part in range(len(saved))]
