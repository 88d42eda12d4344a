"""The compression loop: measure, choose a span, merge it, remeasure the layers after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from come.merge.apply import apply, apply_step, block_states, source_layers_of, write_finish
from come.merge.constraints import check_target
from come.merge.downstream import finish
from come.merge.method import Method, groups_target
from come.merge.plan import BaseModel, MergeStep, Plan, SolvedTensors
from come.merge.reconstruction import ReconstructionTargets
from come.merge.schedules.base import Search
from come.merge.source_layers import SourceLayers
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.trial_scores import TrialScores
from come.merge.unit_scores import unit_scores
from come.models.adapter import ModelAdapter
from come.models.surgery import Span
from come.statistics.influence import check_tokens
from come.statistics.layer_statistics import LayerStatistics, StatisticsCollector
from come.stream.stream import LayerStream, Route

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(adapter: ModelAdapter, name: str = "", fingerprint: str = "") -> BaseModel:
    """Describes a dense model for a plan."""
    return BaseModel(
        name=name or str(adapter.config.name_or_path),
        fingerprint=fingerprint,
        model_type=adapter.architecture.model_type,
        num_layers=adapter.num_layers,
        units=adapter.unit_counts,
    )


def compress(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    method: Method | None = None,
    *,
    target_layers: int,
    stops: Collection[int] = (),
    plan: Plan | None = None,
    on_step: Callable[[Plan], None] | None = None,
    batch_size: int = 4,
    store: str = "memory",
    folder: Path | None = None,
    trials: TrialScores | None = None,
    progress: bool = True,
) -> Plan:
    """Merges spans of layers, in place, until the model has `target_layers` layers.

    Source: arXiv 2510.15304, the progressive strategy. With the progressive schedule, statistics
    are measured again after every merge, on the merged model, for the merged layer and all layers
    after it. Layers before it do not change.

    Args:
        model: the dense model, changed in place (also by an interrupted call).
        windows: calibration windows, packed, without padding, int64.
        method: the merging method; None for the project's own, `merge=come_plus`.
        target_layers: number of layers to reach.
        stops: intermediate depths that spans of variable size must not skip. At each of them
            `on_step` gets a plan with a downstream refit, which is undone before the next merge.
        plan: an empty plan that describes the base model, or the plan of an interrupted call. Its
            steps are applied first, unless the schedule has `restarts`.
        on_step: called with the plan after every merge, while the model has that depth.
        batch_size: windows per batch.
        store: where hidden states are stored, "memory" or "disk".
        folder: folder for the files of the disk store.
        trials: cache of trial-merge scores; new scores are added to it.
        progress: whether to show a progress bar.

    Returns:
        The plan: all decisions, and the merge history.

    Raises:
        ValueError: the model is not supported, the target does not fit or cannot be reached, or
            hidden states are not finite.
    """
    method = (method or Method()).fresh()
    adapter = ModelAdapter(model)
    schedule = method.schedule
    if method.groups:
        reached = groups_target(method.groups, adapter.num_layers)
        if target_layers != reached:
            raise ValueError(f"merge.groups lead to {reached} layers, not to {target_layers}")
    else:
        rules = method.constraints(adapter.num_layers, target_layers)
        check_target(adapter.num_layers, target_layers, rules, stops, schedule.nested)
        schedule.check_depths(adapter.num_layers, [*stops, target_layers])
    if plan is None:
        plan = Plan(
            base_model(adapter),
            method.operator.name,
            method.norms,
            method.block,
            provenance={"recipe": method.record()},
        )
    if schedule.restarts:
        plan = replace(plan, steps=[])
    if plan.num_layers > target_layers:
        plan = replace(plan, finish=SolvedTensors({}))  # valid at that depth only
    spent = float(plan.provenance.get("layer_passes", 0.0))
    stream = LayerStream(
        adapter,
        windows,
        batch_size=batch_size,
        store=store,
        folder=folder,
        progress=progress,
        block=method.block,
    )
    with stream:
        if method.needs_dense and plan.steps and plan.num_layers > target_layers:
            stream.embed()
            stream.advance(0, adapter.num_layers - 1)
            stream.snapshot_dense()
        apply(plan, model)
        search = _Compression(stream, method, [*stops, target_layers], trials or TrialScores())
        steps: list[MergeStep] = []
        merged = plan
        while merged.num_layers > target_layers:
            step = search.next_step(merged)
            merged = merged.with_step(step)
            steps.append(step)
            if not schedule.remeasures and merged.num_layers > target_layers:
                continue
            for ready in steps:
                repaired = search.refitted(plan, ready)
                apply_step(adapter, plan, repaired, search.operator)
                passes = spent + round(stream.layer_passes, 1)
                plan = plan.with_step(repaired, layer_passes=passes)
                search.merged(plan)
                wanted = plan.num_layers == target_layers or plan.num_layers in stops
                finished = search.finished(plan) if wanted else plan
                before = write_finish(adapter, finished)
                if on_step:
                    on_step(finished)
                if plan.num_layers > target_layers:
                    for index, state in before.items():
                        adapter.write(index, state)
                else:
                    plan = finished
            steps.clear()
    return plan


class _Compression:
    """State of a compression between two merges."""

    def __init__(
        self,
        stream: LayerStream,
        method: Method,
        stops: Sequence[int],
        trials: TrialScores,
    ) -> None:
        self.trials = trials
        self.operator = method.operator
        self.metric = method.sensitivity
        self.selection = method.selection
        self.retention = method.retention
        self.schedule = method.schedule
        self.refit = method.refit
        self.stream = stream
        self.method = method
        self.target, self.stops = stops[-1], stops
        self.rules = method.constraints(stream.num_layers, self.target)
        self.statistics: list[LayerStatistics] = []
        self.scores: dict[tuple[int, int], float] = {}
        self.origins: list[int] = []
        self.start = 0  # the first layer without valid statistics
        kinds = self.metric.moments if self.operator.uses_units else ()
        self._collector = StatisticsCollector(stream.adapter, kinds, check_tokens(method.tokens))

    def next_step(self, plan: Plan) -> MergeStep:
        """Updates the statistics if needed, and decides the next merge of `plan`."""
        if self.start < self.stream.num_layers:
            self._measure()
            whole = self.stream.block == "layer"
            self.origins = list(range(self.stream.num_layers)) if whole else plan.places
        history = plan.history
        search = Search(
            stream=self.stream,
            history=history,
            steps=plan.steps if self.method.equals(plan.provenance.get("recipe")) else [],
            origins=self.origins,
            stops=sorted({d for d in self.stops if d < plan.num_layers}, reverse=True),
            rules=self.rules,
            score=self._score,
            group=partial(self._group, history=history),
            split=self._split,
            refine=partial(self._refine, plan),
            shortlist=self.selection.num_trials,
        )
        choice = self.schedule.choose(search)
        self.selection.release()
        first, last = choice.first, choice.last
        group = self._group(first, last, history)
        split = self._split(group, choice.kept)
        self.origins = [
            *self.origins[:first],
            self.origins[first + (choice.kept or 0)],
            *self.origins[last + 1 :],
        ]
        return MergeStep(
            first=first,
            last=last,
            spans=[list(span) for span in group.spans],
            shares=split.shares,
            kept=split.kept,
            score=choice.score,
            candidates=choice.candidates,
            bi=[layer.bi for layer in self.statistics],
            keeper=choice.kept,
        )

    def refitted(self, plan: Plan, step: MergeStep) -> MergeStep:
        """The step with its merged layer fitted to the span's targets in the current model."""
        if not self.refit.active:
            return step
        self.stream.advance(self.stream.valid, step.last)
        places = range(step.first, step.last + 1)
        sources = self._sources(places, UnitAllocation(step.shares, step.kept))
        original = plan.history[step.last][-1]
        targets = self._targets(step.first, step.last, original, self.stream)
        solved = SolvedTensors(self.refit.solve(targets, sources))
        return replace(step, solved=solved, output_scale=self.refit.output_scale(targets, sources))

    def finished(self, plan: Plan) -> Plan:
        """The plan with the downstream refit of all layers after its first merge, if enabled."""
        if self.refit.downstream is None:
            return plan
        found = finish(self.stream, plan.history, self.refit.downstream, self.refit.weights)
        tensors = {
            f"{index}/{name}": tensor
            for index, state in found.items()
            for name, tensor in state.items()
        }
        return replace(plan, finish=SolvedTensors(tensors))

    def _targets(
        self, first: int, last: int, original: int, stream: LayerStream
    ) -> ReconstructionTargets:
        return ReconstructionTargets(
            stream,
            first,
            last,
            original=original,
            target=self.refit.target,
            weighting=self.refit.weights,
        )

    def merged(self, plan: Plan) -> None:
        """Records that the last step of `plan` has been applied to the model."""
        step = plan.steps[-1]
        if self.stream.block == "layer":
            self.stream.merged(step.first, step.last)
            self.start = step.first
        else:
            self.start = replace(plan, steps=plan.steps[:-1]).places[step.first]
            self.stream.invalidate_from(self.start)

    def _measure(self) -> None:
        """Streams all layers whose statistics are missing or outdated."""
        stream, last = self.stream, self.stream.num_layers - 1
        if not self.statistics:
            stream.embed()
            stream.advance(0, last, self._collector)
            if self.method.needs_dense and not stream.has_dense:
                stream.snapshot_dense()
        else:
            stream.advance(self.start, last, self._collector)
        found = self._collector.found
        self.statistics[self.start :] = [found[i] for i in range(self.start, last + 1)]
        _check_finite(self.statistics)
        kept = self.scores.items() if self.selection.local else ()
        self.scores = {span: value for span, value in kept if span[1] < self.start}
        self.selection.prepare(stream)
        self.start = stream.num_layers

    def _score(self, first: int, last: int) -> float:
        if (first, last) not in self.scores:
            score = self.selection.score(self.stream, first, last)
            self.scores[first, last] = self._number(score, first, last)
        return self.scores[first, last]

    def _refine(self, plan: Plan, first: int, last: int) -> float:
        first, last, kept = self.rules.group(first, last)

        def try_it() -> float:
            stream = self.selection.trial_stream(self.stream)
            group = self._group(first, last, plan.history, stream)
            score = self.selection.refine(group, self._split(group, kept), self.refit)
            return self._number(score, first, last)

        return self.trials.score(plan.hash, first, last, try_it)

    def _number(self, score: float, first: int, last: int) -> float:
        if not math.isfinite(score):
            raise ValueError(
                f"merge.selection={self.selection.name} gives no number for layers {first} to "
                f"{last}; try model.dtype=float32 or bfloat16"
            )
        return score

    def _group(
        self, first: int, last: int, history: Sequence[Span], stream: LayerStream | None = None
    ) -> LayerSpan:
        """The span of layers first..last of the plan so far, in positions of the stream's model.

        `stream` holds the windows for targets, losses and gradients; by default all windows.
        """
        stream = stream or self.stream
        places = self.origins[first : last + 1]
        spans = history[first : last + 1]
        statistics = [self.statistics[place] for place in places]
        scores = None
        if self.operator.uses_units:
            scores = partial(unit_scores, stream, self.metric, statistics, spans, layers=places)
        return LayerSpan(
            stream=stream,
            first=places[0],
            last=places[-1],
            spans=spans,
            statistics=statistics,
            sources=partial(self._sources, places),
            trial=partial(self._trial, places),
            refit=self.refit,
            scores=scores,
            targets=partial(self._targets, places[0], places[-1], history[last][-1], stream),
        )

    def _sources(self, places: Sequence[int], split: UnitAllocation) -> SourceLayers:
        return source_layers_of(
            self.stream.adapter,
            places,
            self.operator,
            self.method.norms,
            split.shares,
            split.kept,
        )

    def _trial(self, places: Sequence[int], split: UnitAllocation) -> Route:
        """The layers that would replace the span; changed layers are copies outside the model."""
        adapter, block = self.stream.adapter, self.stream.block
        merged = self._sources(places, split).state
        if block == "layer":
            return [(places[0], adapter.copy_layer(places[0], merged))]
        keeper = split.shares.index(1.0) if self.operator.drops else None
        states = block_states(adapter, places, keeper, merged, block)
        layers = {place: adapter.copy_layer(place, state) for place, state in states.items()}
        return [
            (index, layers.get(index, adapter.layers[index]))
            for index in range(places[0], places[-1] + 1)
        ]

    def _split(self, group: LayerSpan, kept: int | None) -> UnitAllocation:
        if kept is not None:
            return UnitAllocation([float(i == kept) for i in range(group.size)])
        shares = self.operator.fixed_shares(group.size)
        return UnitAllocation(shares) if shares else self.retention.split(group)


def _check_finite(statistics: list[LayerStatistics]) -> None:
    for index, layer in enumerate(statistics):
        if not math.isfinite(layer.bi):
            raise ValueError(
                f"the hidden states after layer {index} are not finite; "
                "try model.dtype=float32 or bfloat16"
            )
