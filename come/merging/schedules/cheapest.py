"""The cheapest set of groups, by the costs of neighbouring layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from come.merging.plan import GroupCandidate, MergeStep
from come.merging.schedules.base import SCHEDULES, Choice, Schedule, Search

Pair = tuple[int, int]
State = tuple[int, int]  # layers saved by the groups for the next depth, and by later ones
Found = tuple[float, tuple[Pair, ...]]  # what they cost, and the groups for the next depth


@SCHEDULES.register
class Cheapest(Schedule):
    """All groups for a depth at once: the set with the least sum of costs of neighbouring layers.

        argmin_groups  sum_{a..b in groups} sum_{a <= i < b} c(i, i + 1)

    over sets of groups of 2 to `merge.m` layers that lead to the target; found by dynamic
    programming. On the way to another depth of `merge.save_at`, the mean of the sums at that depth
    and at the target. c: the selection's score of two layers of the dense model, whose merges cost
    about the same whatever is merged elsewhere, and a larger group about what its neighbours cost
    (experiments/LOG.md). Where the selection tries a shortlist, c is what the trials say, of at
    least twice as many pairs as layers have to go; pairs that are not tried stay apart. Groups are
    merged from the front, so that each is fitted to what it is really given.

    Source: this project.

    Raises:
        ValueError: no set of groups leads to the depths of `merge.save_at`.
    """

    name = "cheapest"
    paper = ""
    source = "least sum of the costs of neighbouring layers"
    mixes = True
    remerges = False

    def choose(self, search: Search) -> Choice:
        """The first group of the set; its score is the sum of its costs."""
        history, rules, depth = search.history, search.rules, len(search.history)
        pairs = [
            (i, i + 1)
            for i in range(rules.protect_first, depth - rules.protect_last - 1)
            if len(history[i]) == len(history[i + 1]) == 1
        ]
        own = [span[0] for span in history]
        known = known_costs(search.steps, sum(map(len, history)))
        costs = {(a, b): known[own[a], own[b]] for a, b in pairs if (own[a], own[b]) in known}
        waiting = sorted(
            search.scored([pair for pair in pairs if pair not in costs]),
            key=lambda candidate: candidate.score,
        )
        count = 0 if costs else len(waiting)
        if search.shortlist and not costs:
            count = max(search.shortlist, 2 * (depth - search.target))
        measured: list[GroupCandidate] = []
        while True:
            batch, waiting = waiting[:count], waiting[count:]
            if search.shortlist:
                batch = search.refined([(c.first, c.last) for c in batch])
            measured += batch
            costs |= {(c.first, c.last): c.score for c in batch}
            groups = cheapest_groups(
                costs, depth, rules.m, depth - search.stop, search.stop - search.target
            )
            if groups:
                break
            if not waiting:
                raise ValueError(
                    f"no groups of layers are left that lead to {search.stop} and then "
                    f"{search.target} layers; leave depths of merge.save_at out"
                )
            count = max(1, search.shortlist)
        first, last = groups[0]
        score = sum(costs[i, i + 1] for i in range(first, last))
        return Choice(first, last, None, score, measured or [GroupCandidate(first, last, score)])


def known_costs(steps: Sequence[MergeStep], num_layers: int) -> dict[Pair, float]:
    """Costs of pairs that were measured in front of earlier merges, by original layers."""
    history, known = [[i] for i in range(num_layers)], {}
    for step in steps:
        for c in step.candidates:
            if len(history[c.first]) == len(history[c.last]) == c.last - c.first == 1:
                known[history[c.first][0], history[c.last][0]] = c.score
        joined = [layer for span in history[step.first : step.last + 1] for layer in span]
        history[step.first : step.last + 1] = [joined]
    return known


def cheapest_groups(
    costs: Mapping[Pair, float], depth: int, m: int, now: int, later: int
) -> tuple[Pair, ...]:
    """The groups that save `now` layers at the least cost.

    Args:
        costs: of two neighbouring layers in one group; pairs without one stay apart.
        depth: layers.
        m: layers of the largest group.
        now: layers to save.
        later: layers that other groups are to save afterwards; what `now` costs counts twice.

    Returns:
        (first, last) of every group, ascending; empty where there is no such set.
    """
    table: list[dict[State, Found]] = [{} for _ in range(depth + 1)]
    table[0][0, 0] = 0.0, ()

    def reach(end: int, state: State, cost: float, groups: tuple[Pair, ...]) -> None:
        if state not in table[end] or cost < table[end][state][0]:
            table[end][state] = cost, groups

    for first in range(depth):
        for (near, far), (cost, groups) in table[first].items():
            reach(first + 1, (near, far), cost, groups)
            total = 0.0
            for last in range(first + 1, min(first + m, depth)):
                if (last - 1, last) not in costs:
                    break
                total += costs[last - 1, last]
                saved = last - first
                if near + saved <= now:
                    joined = (*groups, (first, last))
                    reach(last + 1, (near + saved, far), cost + 2 * total, joined)
                if far + saved <= later:
                    reach(last + 1, (near, far + saved), cost + total, groups)
    return table[depth].get((now, later), (0.0, ()))[1]
