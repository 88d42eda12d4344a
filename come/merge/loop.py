"""The compression loop: measure, choose a span, build its layer, refit it, write it, and repeat."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from come.merge.apply import apply_step, rebuild, source_layers_of, write_downstream
from come.merge.constraints import check_groups_kinds, check_target, layer_kinds
from come.merge.downstream import refit_downstream
from come.merge.method import Method, groups_target
from come.merge.plan import BaseModel, MergeStep, Plan, SolvedTensors
from come.merge.reconstruction import ReconstructionTargets
from come.merge.search import Search
from come.merge.span import LayerSpan
from come.merge.sublayer_drops import drop_sublayers
from come.merge.trial_scores import TrialScores
from come.merge.width import check_depth, kept_units, narrows
from come.models.adapter import ModelAdapter
from come.models.layout import Unit
from come.models.width import units_left
from come.stream.processes import SINGLE, Processes
from come.stream.stream import LayerStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    processes: Processes = SINGLE,
) -> Plan:
    """Merges spans of layers, in place, until the model has `target_layers` layers.

    With `merge.width` or `merge.width_attention`, every layer of the merged model then becomes a
    layer with fewer FFN channels or KV groups, from the first to the last, each fitted to the
    targets of its span. A schedule that drops single sublayers keeps all layers (see
    `come.merge.sublayer_drops`).

    Source: arXiv 2510.15304, the progressive strategy. With the progressive schedule, statistics
    are measured again after every merge, on the merged model, for the merged layer and all layers
    after it. Layers before it do not change.

    Args:
        model: the dense model, changed in place (also by an interrupted call).
        windows: calibration windows, packed, without padding, int64.
        method: the merging method; None for the project's own, `merge=come_plus`.
        target_layers: number of layers to reach; with `merge.width`, it may be the model's own.
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
        processes: the processes that share the windows. Each calls this function with the same
            arguments and gets the same plan, which equals that of one process up to rounding.

    Returns:
        The plan: all decisions, and the merge history.

    Raises:
        ValueError: the model is not supported, the target does not fit or cannot be reached, or
            hidden states are not finite.
    """
    method = (method or Method()).fresh()
    adapter = ModelAdapter(model)
    method.check_layers(adapter.layout.layers)
    kinds = layer_kinds(adapter.layout.layers, method.kinds, method.block)
    needed = adapter.needed_layers if method.block == "layer" else ()
    _check(method, adapter.num_layers, target_layers, stops, kinds)
    kept = kept_units(method, model.config, adapter.layout.layers)
    plan = plan or Plan(
        BaseModel.of(adapter),
        method.operator.name,
        method.norms,
        method.block,
        provenance={"recipe": method.record()},
    )
    if method.schedule.restarts:
        plan = replace(plan, steps=[], dropped=None)

    def merged(plan: Plan) -> bool:
        """Whether only layers are left to narrow."""
        return method.schedule.finished(plan, target_layers)

    def finished(plan: Plan) -> bool:
        return merged(plan) and (not kept or plan.narrowed == plan.num_layers)

    if not finished(plan):
        plan = replace(plan, downstream=SolvedTensors({}))  # valid at that depth only
    spent = float(plan.provenance.get("layer_passes", 0.0))
    with LayerStream(
        adapter,
        windows,
        batch_size=batch_size,
        store=store,
        folder=folder,
        progress=progress,
        block=method.block,
        processes=processes,
    ) as stream:
        if method.drops_sublayers:
            plan = drop_sublayers(stream, method, plan, target_layers)
            if on_step:
                on_step(plan)
            return plan
        if method.needs_dense and plan.steps and not finished(plan):
            stream.embed()
            stream.advance(0, adapter.num_layers - 1)
            stream.snapshot_dense()
        rebuild(plan, adapter)
        rules = method.constraints(adapter.num_layers, target_layers, kinds)
        rules = replace(rules, needed=needed, needs_last=adapter.needs_last)
        search = Search(stream, method, rules, [*stops, target_layers], trials or TrialScores())
        waiting: list[tuple[MergeStep, LayerSpan]] = []  # chosen but not yet written
        ahead = plan  # with the steps that wait
        while not finished(ahead):
            narrowing = merged(ahead)
            search.measure(ahead, scores=not narrowing)
            step, span = _next_step(search, kept if narrowing else {})
            step = processes.broadcast(step)
            ahead = ahead.with_step(step)
            waiting.append((step, span))
            if method.schedule.remeasures or merged(ahead):
                while waiting:
                    step = processes.broadcast(_refitted(stream, method, plan, *waiting.pop(0)))
                    plan = _written(search, method, plan, step, spent)
                    last = finished(plan)
                    saved = last or plan.num_layers in stops
                    plan = _reported(stream, method, plan, on_step, saved=saved, last=last)
    return plan


def _check(
    method: Method, num_layers: int, target: int, stops: Collection[int], kinds: Sequence[Hashable]
) -> None:
    """Raises ValueError if the target or a stop cannot be reached."""
    check_depth(method, num_layers, target)
    if method.groups:
        reached = groups_target(method.groups, num_layers)
        check_groups_kinds(method.groups, method.constraints(num_layers, target, kinds).kinds)
        if target != reached:
            raise ValueError(f"merge.groups lead to {reached} layers, not to {target}")
        return
    if narrows(method) and target == num_layers:
        return
    rules = method.constraints(num_layers, target, kinds)
    check_target(num_layers, target, rules, stops, method.schedule.nested)
    method.schedule.check_depths(num_layers, [*stops, target])


def _next_step(search: Search, counts: Mapping[Unit, int]) -> tuple[MergeStep, LayerSpan]:
    """The next merge with its kept units, before its refit, and its span.

    `counts`: units of the next layer to narrow, by kind; empty for a merge.
    """
    choice, span, split = search.narrowed(counts) if counts else search.choose()
    step = MergeStep(
        first=choice.first,
        last=choice.last,
        spans=[list(layers) for layers in span.spans],
        shares=split.shares,
        kept=split.kept,
        score=choice.score,
        candidates=choice.candidates,
        bi=search.influences(span),
        kept_layer=choice.kept,
        slot=span.slot,
        ruled_out=list(choice.ruled_out),
    )
    return step, span


def _refitted(
    stream: LayerStream, method: Method, plan: Plan, step: MergeStep, span: LayerSpan
) -> MergeStep:
    """The step with its merged layer fitted to the span's targets in the current model."""
    if not method.refit.active:
        return step
    stream.advance(stream.valid, step.last)
    layers = range(step.first, step.last + 1)
    sources = source_layers_of(
        stream.adapter, layers, method.operator, method.norms, step.shares, step.kept, step.slot
    )
    if method.schedule.remeasures and list(span.layers) == list(layers):
        targets = span.targets  # as read by the choice of units
    else:  # chosen in another model, or by another process
        targets = ReconstructionTargets(
            stream,
            step.first,
            step.last,
            original=plan.history[step.last][-1],
            place=step.first + step.slot,
            target=method.refit.target_of(bool(span.narrower)),
            weighting=method.refit.weights,
        )
    counts = stream.adapter.layer_layout(step.first).unit_counts
    targets = targets.with_units(units_left(counts, step.kept))
    solved = SolvedTensors(method.refit.solve(targets, sources))
    return replace(step, solved=solved, output_scale=method.refit.output_scale(targets, sources))


def _written(search: Search, method: Method, plan: Plan, step: MergeStep, spent: float) -> Plan:
    """Writes a step to the model; returns the plan with it. `spent`: passes of earlier calls."""
    stream = search.stream
    apply_step(stream.adapter, plan, step, method.operator)
    passes = spent + round(stream.processes.reduced(stream.layer_passes), 1)
    plan = plan.with_step(step, layer_passes=passes)
    search.invalidate_from(_changed_from(stream, plan))
    return plan


def _changed_from(stream: LayerStream, plan: Plan) -> int:
    """Tells the stream that `plan`'s last step is written; returns the first changed layer."""
    step = plan.steps[-1]
    if stream.block == "layer":
        stream.merged(step.first, step.last, step.slot)
        return step.first
    first = replace(plan, steps=plan.steps[:-1]).places[step.first]
    stream.invalidate_from(first)
    return first


def _reported(
    stream: LayerStream,
    method: Method,
    plan: Plan,
    on_step: Callable[[Plan], None] | None,
    *,
    saved: bool,
    last: bool,
) -> Plan:
    """Calls `on_step` with the plan, while the model has its downstream refit if it is `saved`.

    Returns:
        The plan with that refit if it is the `last` one; otherwise the refit is undone.
    """
    solved = _downstream(stream, method, plan) if saved else plan.downstream
    complete = replace(plan, downstream=stream.processes.broadcast(solved))
    before = write_downstream(stream.adapter, complete)
    if on_step:
        on_step(complete)
    if last:
        return complete
    for index, state in before.items():
        stream.adapter.write(index, state)
    return plan


def _downstream(stream: LayerStream, method: Method, plan: Plan) -> SolvedTensors:
    """The downstream refit of all layers after the plan's first merge, if enabled."""
    if method.refit.downstream is None:
        return plan.downstream
    found = refit_downstream(stream, plan.history, method.refit.downstream, method.refit.weights)
    tensors = {
        f"{index}/{name}": tensor
        for index, state in found.items()
        for name, tensor in state.items()
    }
    return SolvedTensors(tensors)
