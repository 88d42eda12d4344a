"""The cheapest set of groups, by what neighbouring layers and tried groups cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from math import prod
from statistics import fmean

from come.merge.combination import Combination
from come.merge.plan import GroupCandidate, MergeStep
from come.merge.schedules.base import SCHEDULES, Choice, Schedule, Search

Group = tuple[int, int]  # first and last layer
Cost = Callable[[int, int], float | None]  # of the group first..last; None where it stays apart
State = tuple[int, ...]  # layers saved for every depth ahead
Found = tuple[float, tuple[tuple[int, Group], ...]]  # the cost, and each group with its depth
LARGEST = 1 << 17  # states of the dynamic programming at one layer


@SCHEDULES.register
class OptimalPartition(Schedule):
    """All groups for all depths at once: the sets that cost least.

        argmin  sum_depths sum_{a..b merged at this depth} c(a, b)

    over sets of groups of 2 to `merge.m` layers that lead to every depth of `merge.save_at` and to
    the target; the groups of a depth stay merged at the next. Found by dynamic programming.
    c(i, i + 1): the selection's score of two layers of the dense model, whose merges cost about the
    same whatever is merged elsewhere; c of a larger group: the sum over its pairs, which it costs
    about (experiments/LOG.md). Groups of a depth are merged from the front, so that each is fitted
    to what it is really given.

    Where the selection tries a shortlist, c is what the trials say, of at least twice as many pairs
    as layers have to go; other pairs stay apart. Larger groups are tried when they stand in a set,
    until all of them have been tried; the sums of others are stretched by the mean of what tried
    ones cost over theirs.

    Source: this project.

    Raises:
        ValueError: no set of groups leads to the depths, or there are too many.
    """

    name = "optimal_partition"
    former = "cheapest"
    paper = ""
    source = "least sum of the costs of groups"
    variable_size = True

    @classmethod
    def check_depths(cls, num_layers: int, depths: Collection[int]) -> None:
        """Raises ValueError where planning all depths together would take too long."""
        ahead = sorted(set(depths), reverse=True)
        if prod(a - b + 1 for a, b in pairwise([num_layers, *ahead])) > LARGEST:
            raise ValueError(
                "merge.schedule=optimal_partition plans all depths together, and merge.save_at has "
                f"too many: {', '.join(map(str, ahead))}; leave some out, or choose "
                "merge.schedule=mixed merge.selection=angular"
            )

    def check(self, method: Combination) -> None:
        """Costs are those of the dense model's layers."""
        super().check(method)
        if method.allow_remerge:
            raise ValueError(
                f"merge.schedule={self.name} adds costs of the dense model's layers, so "
                "merge.allow_remerge=true is not possible with it; choose merge.schedule=mixed "
                "merge.selection=angular"
            )

    def choose(self, search: Search) -> Choice:
        """The first group of the next depth's set."""
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
            if free[i] and free[i + 1] and (own[i], own[i + 1]) not in costs
        ]
        count = len(waiting)
        if search.shortlist:
            count = max(search.shortlist, 2 * (layers - search.target))
        known = sum(last - first == 1 for first, last in costs)
        missing = _ranked(search, waiting)[: count - known] if count > known else []
        measured: list[GroupCandidate] = []
        while True:
            waiting = [pair for pair in waiting if pair not in missing]
            found = search.refined(missing) if search.shortlist else search.scored(missing)
            measured += found
            costs |= {(own[c.first], own[c.last]): c.score for c in found}
            estimated = estimate(costs)

            def cost(first: int, last: int, of: Cost = estimated) -> float | None:
                return of(own[first], own[last]) if all(free[first : last + 1]) else None

            groups = optimal_partition(cost, depth, rules.m, saved)
            if groups is None:
                missing = _ranked(search, waiting)[:count]
                if not missing:
                    raise ValueError(
                        "no groups of layers are left that lead to "
                        f"{', '.join(map(str, search.stops))} layers; leave depths of "
                        "merge.save_at out"
                    )
                continue
            missing = [g for part in groups for g in part if (own[g[0]], own[g[1]]) not in costs]
            if not missing or not search.shortlist:
                break
        first, last = groups[0][0]
        score = cost(first, last)
        assert score is not None
        return Choice(first, last, None, score, measured or [GroupCandidate(first, last, score)])


def _ranked(search: Search, pairs: list[Group]) -> list[Group]:
    """The pairs, lowest score first where a shortlist of them is tried."""
    if not search.shortlist:
        return pairs
    order = sorted(search.scored(pairs), key=lambda candidate: candidate.score)
    return [(c.first, c.last) for c in order]


def known_costs(steps: Sequence[MergeStep], num_layers: int) -> dict[Group, float]:
    """What was measured in front of earlier merges, of groups of original layers.

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


def estimate(costs: Mapping[Group, float]) -> Cost:
    """Gives what a group costs, as measured or by its pairs; None where one of those is unknown.

    By its pairs: their sum, times the mean of what measured groups cost over the sums of theirs.
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
) -> list[list[Group]] | None:
    """The groups that lead from `depth` layers to one depth after the other, at the least cost.

    Args:
        cost: of a group of layers first..last; None where it stays apart.
        depth: layers.
        m: layers of the largest group.
        saved: layers to save for each of the depths. What the groups of the first of n depths cost
            counts n times, of the last once.

    Returns:
        The groups of each depth, ascending; None where there are no such sets.
    """
    table: list[dict[State, Found]] = [{} for _ in range(depth + 1)]
    table[0][(0,) * len(saved)] = 0.0, ()

    def reach(end: int, state: State, found: Found) -> None:
        if state not in table[end] or found[0] < table[end][state][0]:
            table[end][state] = found

    for first in range(depth):
        prices = [(last, cost(first, last)) for last in range(first + 1, min(first + m, depth))]
        groups = [(last, price) for last, price in prices if price is not None]
        for state, (total, chosen) in table[first].items():
            reach(first + 1, state, (total, chosen))
            for last, price in groups:
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
    return [[group for at, group in best[1] if at == part] for part in range(len(saved))]
