"""The cheapest set of groups, by what neighbouring layers and tried groups cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from come.merging.plan import GroupCandidate, MergeStep
from come.merging.schedules.base import SCHEDULES, Choice, Schedule, Search
from come.models.surgery import Span

Group = tuple[int, int]  # first and last layer, in the current model
Cost = Callable[[int, int], float | None]  # of the group first..last; None where it stays apart
State = tuple[int, int]  # layers saved by the groups for the next depth, and by later ones
Found = tuple[float, tuple[Group, ...], tuple[Group, ...]]  # what they cost, and both kinds


@SCHEDULES.register
class Cheapest(Schedule):
    """All groups for a depth at once: the set that costs least.

        argmin_groups  sum_{a..b in groups} c(a, b)

    over sets of groups of 2 to `merge.m` layers that lead to the target; found by dynamic
    programming. On the way to another depth of `merge.save_at`, the mean of the sums at that depth
    and at the target. c(i, i + 1): the selection's score of two layers of the dense model, whose
    merges cost about the same whatever is merged elsewhere; c of a larger group: the sum over its
    pairs, which it costs about (experiments/LOG.md). Groups are merged from the front, so that each
    is fitted to what it is really given.

    Where the selection tries a shortlist, c is what the trials say, of at least twice as many pairs
    as layers have to go; other pairs stay apart. Larger groups are tried when they stand in the
    set, until all of it has been tried; the sums of others are stretched by the mean of what tried
    ones cost over theirs.

    Source: this project.

    Raises:
        ValueError: no set of groups leads to the depths of `merge.save_at`.
    """

    name = "cheapest"
    paper = ""
    source = "least sum of the costs of groups"
    mixes = True
    remerges = False

    def choose(self, search: Search) -> Choice:
        """The first group of the set."""
        history, rules, depth = search.history, search.rules, len(search.history)
        now, later = depth - search.stop, search.stop - search.target
        costs = known_costs(search.steps, history)
        waiting = [
            (i, i + 1)
            for i in range(rules.protect_first, depth - rules.protect_last - 1)
            if len(history[i]) == len(history[i + 1]) == 1 and (i, i + 1) not in costs
        ]
        count = len(waiting)
        if search.shortlist:
            order = sorted(search.scored(waiting), key=lambda candidate: candidate.score)
            waiting = [(c.first, c.last) for c in order]
            count = max(search.shortlist, 2 * (now + later))
        missing = [] if costs else waiting[:count]
        measured: list[GroupCandidate] = []
        while True:
            waiting = [pair for pair in waiting if pair not in missing]
            found = search.refined(missing) if search.shortlist else search.scored(missing)
            measured += found
            costs |= {(c.first, c.last): c.score for c in found}
            cost = estimate(costs)
            groups = cheapest_groups(cost, depth, rules.m, now, later)
            if groups is None:
                missing = waiting[:count]
                if not missing:
                    raise ValueError(
                        f"no groups of layers are left that lead to {search.stop} and then "
                        f"{search.target} layers; leave depths of merge.save_at out"
                    )
                continue
            missing = [group for part in groups for group in part if group not in costs]
            if not missing or not search.shortlist:
                break
        first, last = groups[0][0]
        score = cost(first, last)
        assert score is not None
        return Choice(first, last, None, score, measured or [GroupCandidate(first, last, score)])


def known_costs(steps: Sequence[MergeStep], history: Sequence[Span]) -> dict[Group, float]:
    """What was measured in front of earlier merges, of layers that are still apart.

    Args:
        steps: the merges so far.
        history: original layers behind every layer of the current model.
    """
    then = [[i] for i in range(sum(map(len, history)))]
    place = {span[0]: i for i, span in enumerate(history) if len(span) == 1}
    known = {}
    for step in steps:
        for c in step.candidates:
            layers = [layer for span in then[c.first : c.last + 1] for layer in span]
            if all(layer in place for layer in layers):
                known[place[layers[0]], place[layers[-1]]] = c.score
        joined = [layer for span in then[step.first : step.last + 1] for layer in span]
        then[step.first : step.last + 1] = [joined]
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


def cheapest_groups(
    cost: Cost, depth: int, m: int, now: int, later: int
) -> tuple[tuple[Group, ...], tuple[Group, ...]] | None:
    """The groups that save `now` layers, and others that save `later` more, at the least cost.

    Args:
        cost: of a group of layers first..last; None where it stays apart.
        depth: layers.
        m: layers of the largest group.
        now: layers to save; what these groups cost counts twice.
        later: layers to save afterwards.

    Returns:
        The groups of both kinds, ascending; None where there is no such set.
    """
    table: list[dict[State, Found]] = [{} for _ in range(depth + 1)]
    table[0][0, 0] = 0.0, (), ()

    def reach(end: int, state: State, found: Found) -> None:
        if state not in table[end] or found[0] < table[end][state][0]:
            table[end][state] = found

    for first in range(depth):
        groups = [
            (last, price)
            for last in range(first + 1, min(first + m, depth))
            if (price := cost(first, last)) is not None
        ]
        for (near, far), (total, ones, others) in table[first].items():
            reach(first + 1, (near, far), (total, ones, others))
            for last, price in groups:
                group, saved = (first, last), last - first
                if near + saved <= now:
                    found = (total + 2 * price, (*ones, group), others)
                    reach(last + 1, (near + saved, far), found)
                if far + saved <= later:
                    found = (total + price, ones, (*others, group))
                    reach(last + 1, (near, far + saved), found)
    best = table[depth].get((now, later))
    return best[1:] if best else None
