"""The search for the next span: candidates of the current model, their scores and trial merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from come.merge.combination import Combination
from come.merge.constraints import SpanConstraints
from come.merge.plan import MergeStep, Plan, SpanCandidate
from come.merge.selection.skip_loss import losses_without
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.trial_scores import TrialScores
from come.models.layout import Unit
from come.models.surgery import Span
from come.progress import ProgressBar
from come.statistics.influence import check_tokens
from come.statistics.layer_statistics import LayerStatistics, StatisticsCollector
from come.stream.candidates import together
from come.stream.stream import LayerStream

T = TypeVar("T")
PlanSpan = tuple[int, int]
"""First and last layer of a span, as positions in the plan's model."""
StreamSpan = tuple[int, int]
"""First and last layer of a span, as positions in the stream's model."""
TrialSpan = tuple[int, int, int | None]
"""First and last layer of a span, and the index of the layer that a drop keeps."""


@dataclass(frozen=True)
class Choice:
    """The next span to merge, layers first..last of the current model, and its scores.

    Attributes:
        first: first layer of the span.
        last: last layer of the span, inclusive.
        kept: index in the span of the layer that a drop keeps; None for a merge.
        score: score of the chosen span.
        candidates: all spans scored for this choice; with a shortlist, only the spans tried.
        ruled_out: spans of original layers that no later choice may take.
    """

    first: int
    last: int
    kept: int | None
    score: float
    candidates: list[SpanCandidate]
    ruled_out: Sequence[tuple[int, int]] = ()


class Search:
    """The candidates for the next merge. Layers are positions in the plan's model.

    The stream's model is the plan's if the schedule remeasures, otherwise the dense model;
    `origins` maps a position in the plan's model to one in the stream's.

    Args:
        stream: the layer stream.
        method: the merging method.
        rules: which spans are allowed.
        stops: depths that must not be skipped, the target last.
        trials: cache of trial-merge scores.

    Attributes:
        trials: that cache.
        plan: the merges so far.
        origins: position in the stream's model of every layer of the plan's model.
        statistics: statistics of the stream's layers measured so far, from the first layer on.
    """

    def __init__(
        self,
        stream: LayerStream,
        method: Combination,
        rules: SpanConstraints,
        stops: Sequence[int],
        trials: TrialScores,
    ) -> None:
        self.stream = stream
        self.method = method
        self.rules = rules
        self.target = stops[-1]
        self.plan: Plan
        self.origins: list[int] = []
        self.statistics: list[LayerStatistics] = []
        self._needed = rules.needed  # by layer of the base model
        self._stops = stops
        self.trials = trials
        self._scores: dict[StreamSpan, float] = {}
        self._start = 0  # the first layer without valid statistics
        self._embedded = False
        self._ready = False  # whether the selection can score the current model's spans
        self._scored = True  # whether the next step needs scores
        scored = method.operator.uses_units and method.retention.uses_scores
        kinds = method.sensitivity.moments if scored else ()
        self._collector = StatisticsCollector(
            stream.adapter, kinds, check_tokens(method.tokens), stream.processes
        )

    @property
    def history(self) -> Sequence[Span]:
        """Original layers merged into each layer of the plan's model."""
        return self.plan.history

    @property
    def steps(self) -> Sequence[MergeStep]:
        """The merges so far; none if their candidates were scored with another method."""
        same = self.method.equals(self.plan.provenance.get("recipe"))
        return self.plan.steps if same else []

    @property
    def stops(self) -> list[int]:
        """The remaining depths that must not be skipped, the target last."""
        return sorted({d for d in self._stops if d < self.plan.num_layers}, reverse=True)

    @property
    def shortlist(self) -> int:
        """Number of spans with the lowest scores that are merged on trial; 0 for no trials."""
        return int(self.method.selection.num_trials)

    def measure(self, plan: Plan, *, scores: bool = True) -> None:
        """Sets the plan, and updates statistics and scores to the stream's model.

        With `measures_ahead`, a layer of a merged model is measured only when a span or a score
        needs its statistics. The same holds without scores, which narrowing a layer does not need.
        """
        self.plan, self._scored = plan, scores
        if self._needed:
            needed = tuple(self._needed[index] for index in plan.places)
            self.rules = replace(self.rules, needed=needed)
        stream = self.stream
        if self._start == stream.num_layers:
            return
        kept = self._scores.items() if self.method.selection.local else ()
        self._scores = {span: value for span, value in kept if span[1] < self._start}
        self._ready = False
        self.origins = list(range(stream.num_layers)) if stream.block == "layer" else plan.places
        if not self._embedded:
            stream.embed()
            self._embedded = True
        lazily = self._measures_lazily
        if scores and not lazily:
            self._prepare_scores()
        elif not lazily or (self.method.needs_dense and not stream.has_dense):
            self._measure_all()

    @property
    def _measures_lazily(self) -> bool:
        """Whether layers of the current model are measured only when they are needed."""
        if not self._scored:
            return self.method.retention.local or not self.method.sensitivity.gradient
        return self.method.measures_ahead and bool(self.plan.steps)

    def influences(self, span: LayerSpan) -> list[float]:
        """Block influence of all layers, or of those up to the span (see `measure`)."""
        found = self.statistics[: span.last + 1] if self._measures_lazily else self.statistics
        return [layer.bi for layer in found]

    def _measure_through(self, last: int) -> None:
        """Measures all layers up to `last` of the stream's model that are not measured yet."""
        if self._start > last:
            return
        self.stream.advance(self._start, last, self._collector)
        found = self._collector.found
        self.statistics[self._start :] = [found[i] for i in range(self._start, last + 1)]
        _check_finite(self.statistics)
        self._start = last + 1

    def _prepare_scores(self) -> None:
        """Measures all layers, and prepares the selection to score spans of them."""
        if self._ready:
            return
        self._measure_all()
        self.method.selection.prepare(self.stream)
        self._ready = True

    def _measure_all(self) -> None:
        """Measures all layers; those of the dense model are the first ones."""
        self._measure_through(self.stream.num_layers - 1)
        if self.method.needs_dense and not self.stream.has_dense:
            self.stream.snapshot_dense()

    def invalidate_from(self, layer: int) -> None:
        """Records that the stream's model has changed from this layer on."""
        self._start = min(self._start, layer)
        del self.statistics[layer:]

    def narrowed(self, counts: Mapping[Unit, int]) -> tuple[Choice, LayerSpan, UnitAllocation]:
        """The first layer that still has all units, and as many as `counts` that it keeps."""
        place = self.plan.narrowed
        span = replace(self.span(place, place), narrower=counts)
        return Choice(place, place, None, 0.0, []), span, self.split(span, None)

    def choose(self) -> tuple[Choice, LayerSpan, UnitAllocation]:
        """The schedule's choice, its span, and the span's unit allocation."""
        choice = self.method.schedule.choose(self)
        self.method.selection.release()
        span = self.span(choice.first, choice.last, choice.kept)
        split = self.split(span, choice.kept)
        self.origins[choice.first : choice.last + 1] = [
            self.origins[choice.first + (choice.kept or 0)]
        ]
        return choice, span, split

    def score(self, first: int, last: int) -> float:
        """The selection's score of layers first..last; cached while it cannot have changed."""
        return self.scored([(first, last)])[0].score

    def span(
        self, first: int, last: int, kept: int | None = None, stream: LayerStream | None = None
    ) -> LayerSpan:
        """The span of layers first..last.

        `kept` is the index of the layer that a drop keeps. `stream` holds the windows for targets,
        losses and gradients; by default all windows.
        """
        layers = self.origins[first : last + 1]
        self._measure_through(layers[-1])
        return LayerSpan(
            stream=stream or self.stream,
            layers=layers,
            spans=self.history[first : last + 1],
            statistics=[self.statistics[layer] for layer in layers],
            operator=self.method.operator,
            norms=self.method.norms,
            refit=self.method.refit,
            sensitivity=self.method.sensitivity,
            slot=self.method.slot(last + 1 - first) if kept is None else kept,
        )

    def split(self, span: LayerSpan, kept: int | None, *, trial: bool = False) -> UnitAllocation:
        """The unit allocation of a span; `kept`: index of the layer that a drop keeps."""
        if kept is not None:
            return UnitAllocation.drop(span.size, kept)
        if shares := self.method.operator.fixed_shares(span.size):
            return UnitAllocation(shares)
        retention = self.method.retention
        split: UnitAllocation = retention.trial_split(span) if trial else retention.split(span)
        return split

    def losses(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """Calibration losses of the stream's model without each set of layers, nats per token."""
        do, found = partial(losses_without, self.stream.unshared()), list[float]()
        with ProgressBar(total=len(sets), desc="drops on trial", shown=self.stream.progress) as bar:
            for some in together(self.stream, sets, self.stream.processes.count):
                found += self.losses_by(do, some)
                bar.update(len(some))
        return found

    def losses_by(
        self,
        do: Callable[[Sequence[Sequence[int]]], Sequence[float]],
        sets: Sequence[Sequence[int]],
    ) -> list[float]:
        """The losses without each set of layers: known ones, the others by one call of `do`."""
        plan = self.plan.hash
        keys = [tuple((layer, layer) for layer in removed) for removed in sets]
        known = [self.trials.get(plan, *key) for key in keys]
        missing = [index for index, loss in enumerate(known) if loss is None]
        if missing:
            found = self.measured([sets[index] for index in missing], do)
            added = {keys[i]: loss for i, loss in zip(missing, found, strict=True)}
            self.trials.add(plan, added)
        return [loss for key in keys if (loss := self.trials.get(plan, *key)) is not None]

    def measured(
        self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[float]]
    ) -> list[float]:
        """A loss for each item, by all processes.

        Raises:
            ValueError: a loss is not finite.
        """
        found = self.stream.processes.map(items, do)
        if not all(map(math.isfinite, found)):
            raise ValueError(
                f"merge.schedule={self.method.schedule.name}: the loss or divergence of a smaller "
                "model is not finite; try model.dtype=float32 or bfloat16"
            )
        return found

    def lowest(self, spans: Sequence[PlanSpan]) -> Choice:
        """The span with the lowest score; with a shortlist, the one with the lowest trial score."""
        candidates = self.scored(spans)
        if self.shortlist and len(candidates) > 1:
            best = sorted(candidates, key=lambda candidate: candidate.score)[: self.shortlist]
            candidates = self.tried([(c.first, c.last) for c in best])
        return self.chosen(candidates)

    def scored(self, spans: Sequence[PlanSpan]) -> list[SpanCandidate]:
        """The spans with their scores, which are cached while they cannot have changed."""
        in_stream = [(self.origins[first], self.origins[last]) for first, last in spans]
        missing = [span for span in dict.fromkeys(in_stream) if span not in self._scores]
        if missing:
            self._prepare_scores()
        selection, stream = self.method.selection, self.stream.unshared()
        found = self.stream.processes.map(missing, partial(selection.scores, stream))
        for own, score in zip(missing, found, strict=True):
            self._scores[own] = self._number(score, *own)
        return [
            SpanCandidate(*span, self._scores[own])
            for span, own in zip(spans, in_stream, strict=True)
        ]

    def tried(self, spans: Sequence[PlanSpan]) -> list[SpanCandidate]:
        """The spans with the scores of their trial merges, or drops."""
        plan, removals = self.plan.hash, [self.rules.removal(*span) for span in spans]
        missing = [r for r in dict.fromkeys(removals) if self.trials.get(plan, r[:2]) is None]
        if missing:
            self._prepare_scores()
        with ProgressBar(total=len(spans), desc="trial merges", shown=self.stream.progress) as bar:
            bar.update(len(spans) - len(missing))
            for some in together(self.stream, missing, self.stream.processes.count):
                found = self.stream.processes.map(some, self.trial_scores)
                self.trials.add(
                    plan,
                    {
                        ((first, last),): self._number(score, first, last)
                        for (first, last, _), score in zip(some, found, strict=True)
                    },
                )
                bar.update(len(some))
        scores = [self.trials.get(plan, removal[:2]) for removal in removals]
        return [
            SpanCandidate(*span, score)
            for span, score in zip(spans, scores, strict=True)
            if score is not None
        ]

    def trial_scores(self, spans: Sequence[TrialSpan]) -> list[float]:
        """Scores of trial merges, by this process."""
        return self.method.selection.refine_all(self._trial_merges(spans), self.method.refit)

    def _trial_merges(
        self, spans: Sequence[TrialSpan]
    ) -> Iterator[tuple[LayerSpan, UnitAllocation]]:
        """The spans of trial merges and their unit allocations, in order."""
        stream = self.method.selection.trial_stream(self.stream.unshared())
        for first, last, kept in spans:
            span = self.span(first, last, kept, stream)
            yield span, self.split(span, kept, trial=True)

    def chosen(self, candidates: list[SpanCandidate]) -> Choice:
        """The candidate with the lowest score; ties go to the first one."""
        best = min(candidates, key=lambda candidate: candidate.score)
        first, last, kept = self.rules.removal(best.first, best.last)
        return Choice(first, last, kept, best.score, candidates)

    def _number(self, score: float, first: int, last: int) -> float:
        if not math.isfinite(score):
            raise ValueError(
                f"merge.selection={self.method.selection.name} gives no number for layers {first} "
                f"to {last}; try model.dtype=float32 or bfloat16"
            )
        return score


def _check_finite(statistics: list[LayerStatistics]) -> None:
    for index, layer in enumerate(statistics):
        if not math.isfinite(layer.bi):
            raise ValueError(
                f"the hidden states after layer {index} are not finite; "
                "try model.dtype=float32 or bfloat16"
            )
