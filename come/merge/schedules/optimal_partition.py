"""The set of spans with the lowest total cost, by dynamic programming over span costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from statistics import fmean

from come.merge.combination import Combination
from come.merge.plan import MergeStep, SpanCandidate
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search
from come.merge.set_scores import SetScores
from come.setting import setting

log = logging.getLogger(__name__)

Bounds = tuple[int, int]  # first and last layer
Cost = Callable[[int, int], float | None]  # of the span first..last; None if it must not merge
Sets = list[list[Bounds]]  # the spans merged at each remaining depth
State = tuple[int, ...]  # layers removed so far for each remaining depth
Found = tuple[float, tuple[tuple[int, Bounds], ...]]  # total cost; each span with its depth's index
LARGEST = 1 << 17  # most dynamic-programming states at one layer


@SCHEDULES.register
@dataclass(eq=False)
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

    Spans that are good alone can be bad together. So the layers of the trial merges of several
    sets are put into the model, and the set with the lowest score of the whole model is taken
    (`candidate_sets`; whole layers only).

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

    candidate_sets: int = setting(
        4,
        "sets of spans whose trial merges are put into the model together and compared; 1 takes "
        "the set with the least sum of scores",
        least=1,
    )

    @property
    def sets_compared(self) -> int:
        """The candidate sets, if they are compared."""
        return self.candidate_sets if self.candidate_sets > 1 else 0

    @property
    def surrogate(self) -> Schedule:
        """Sums of scores only."""
        return replace(self, candidate_sets=1)

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
        # only at the first choice: positions are those of the dense model, and so of its trials
        first_choice = not search.plan.steps and search.plan.block == "layer"
        together: SetScores | None = None
        if first_choice and self.sets_compared and search.method.selection.scores_sets:
            together = SetScores(search)
        costs = SpanCosts(search)
        ruled_out = frozenset(span for step in search.steps for span in step.ruled_out)
        sets = costs.cheapest(ruled_out)
        if sets is None:
            raise ValueError(
                "no spans are left that lead to "
                f"{', '.join(map(str, search.stops))} layers; leave depths of merge.save_at out"
            )
        if together is not None and sum(map(len, sets)) > 1:
            sets, ruled_out = self._best_together(together, costs, sets)
        first, last = sets[0][0]
        score = costs.of(first, last)
        assert score is not None
        found = costs.measured or [SpanCandidate(first, last, score)]
        return Choice(first, last, None, score, found, sorted(ruled_out))

    def _best_together(
        self, together: SetScores, costs: SpanCosts, sets: Sets
    ) -> tuple[Sets, frozenset[Bounds]]:
        """The best of `candidate_sets` sets when merged together, and the spans that it rules out.

        Starts from the cheapest set. Each further candidate is the cheapest one without one of the
        spans of the best set so far. Without the spans that are ruled out in the end, the best set
        is the cheapest by all scores known then, so that later steps choose its other spans.
        """
        best, out, least = sets, frozenset[Bounds](), _total(together, sets)
        seen = {_key(sets)}
        while len(seen) < self.candidate_sets:
            nearby = []
            for span in _key(best):
                other = costs.estimated(out | {span})
                if other is not None and _key(other) not in seen:
                    nearby.append((costs.total(other), sorted(out | {span})))
            if not nearby:
                break
            without = frozenset(min(nearby)[1])
            found = costs.cheapest(without)
            if found is None or _key(found) in seen:  # trials of its spans changed the estimate
                break
            seen.add(_key(found))
            total = _total(together, found)
            if total < least:
                best, out, least = found, without, total
        while True:
            cheapest = costs.cheapest(out)
            assert cheapest is not None  # the best set is one
            others = set(_key(cheapest)) - set(_key(best))
            if not others:
                return cheapest, out
            out |= others


class SpanCosts:
    """Costs of the spans of the current model's layers, measured when a set contains them.

    Args:
        search: the search; the costs of its earlier steps are used.

    Attributes:
        measured: the spans measured so far, with their scores.
    """

    def __init__(self, search: Search) -> None:
        history, rules, depth = search.history, search.rules, len(search.history)
        layers = sum(map(len, history))
        self.measured: list[SpanCandidate] = []
        self._search = search
        self._saved = [a - b for a, b in pairwise([depth, *search.stops])]
        self._own = [span[0] for span in history]
        self._free = [
            len(span) == 1 and rules.protect_first <= i < depth - rules.protect_last
            for i, span in enumerate(history)
        ]
        self._costs = known_costs(search.steps, layers)
        self._waiting = [
            (i, i + 1)
            for i in range(depth - 1)
            if self._free[i] and self._free[i + 1] and rules.alike(history, i, i + 1)
            if (self._own[i], self._own[i + 1]) not in self._costs
        ]
        self._count = len(self._waiting)
        if search.shortlist:
            self._count = max(search.shortlist, 2 * (layers - search.target))
        known = sum(last - first == 1 for first, last in self._costs)
        self._measure(_ranked(search, self._waiting)[: max(0, self._count - known)])

    def of(self, first: int, last: int) -> float | None:
        """The measured or estimated cost of a span; None if it must not merge."""
        if not all(self._free[first : last + 1]):
            return None
        return estimate(self._costs)(self._own[first], self._own[last])

    def total(self, sets: Sets) -> float:
        """The cost of all spans of a set; a span counts for every depth that has it."""
        depths = len(self._saved)
        costs = [(depths - at, self.of(*span)) for at, part in enumerate(sets) for span in part]
        return sum(times * cost for times, cost in costs if cost is not None)

    def estimated(self, ruled_out: Collection[Bounds]) -> Sets | None:
        """The cheapest set by the costs known so far, without the spans ruled out.

        `ruled_out` has spans of original layers. None if no set leads to the depths.
        """
        of = estimate(self._costs)

        def cost(first: int, last: int) -> float | None:
            own = self._own[first], self._own[last]
            return of(*own) if all(self._free[first : last + 1]) and own not in ruled_out else None

        return optimal_partition(cost, len(self._own), self._search.rules.m, self._saved)

    def cheapest(self, ruled_out: Collection[Bounds]) -> Sets | None:
        """The cheapest set, all of whose spans are measured, without the spans ruled out."""
        while True:
            sets = self.estimated(ruled_out)
            if sets is None:
                missing = _ranked(self._search, self._waiting)[: self._count]
                if not missing:
                    return None
            else:
                spans = [span for part in sets for span in part]
                missing = [
                    s for s in spans if (self._own[s[0]], self._own[s[1]]) not in self._costs
                ]
                if not missing or not self._search.shortlist:
                    return sets
            self._measure(missing)

    def _measure(self, spans: list[Bounds]) -> None:
        search = self._search
        self._waiting = [pair for pair in self._waiting if pair not in spans]
        found = search.tried(spans) if search.shortlist else search.scored(spans)
        self.measured += found
        self._costs |= {(self._own[c.first], self._own[c.last]): c.score for c in found}


def _key(sets: Sets) -> tuple[Bounds, ...]:
    """All spans of a set, ascending."""
    return tuple(sorted(span for part in sets for span in part))


def _total(together: SetScores, sets: Sets) -> float:
    """The sum over depths of the scores of the model with all spans merged down to that depth."""
    depths = [_key(sets[: at + 1]) for at in range(len(sets)) if sets[at]]
    scores = together.scored(depths)
    for spans, score in zip(depths, scores, strict=True):
        shown = ", ".join(f"{first}-{last}" for first, last in spans)
        log.info("together %s: %.4f", shown, score)
    return sum(scores)


def _ranked(search: Search, pairs: list[Bounds]) -> list[Bounds]:
    """The pairs; with a shortlist, sorted by score, lowest first."""
    if not search.shortlist:
        return pairs
    order = sorted(search.scored(pairs), key=lambda candidate: candidate.score)
    return [(c.first, c.last) for c in order]


def known_costs(steps: Sequence[MergeStep], num_layers: int) -> dict[Bounds, float]:
    """Costs measured before earlier merges, for spans of unmerged original layers."""
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
