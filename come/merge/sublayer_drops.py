"""Drops single sublayers of a model, and refits the sublayers before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from come.merge.apply import source_layers_of
from come.merge.combination import Combination
from come.merge.dropped import SublayerDrops, zero_dropped
from come.merge.plan import Plan, SolvedTensors
from come.merge.reconstruction import ReconstructionTargets, TargetBatch, Weighting
from come.merge.schedules.base import SublayerSchedule
from come.models.layer_state import LayerState
from come.models.layout import LayerLayout, Sublayer
from come.models.sublayers import States, states_after
from come.stream.stream import LayerStream

Place = tuple[int, str]
"""A layer, and the name of one of its sublayers."""


@torch.no_grad()
def drop_sublayers(stream: LayerStream, method: Combination, plan: Plan, target: int) -> Plan:
    """Drops the sublayers that the schedule chooses on the dense model, in place.

    From the first layer to the last, a sublayer k that is left with dropped ones after it gets the
    output projection

        W = argmin sum_t w_t | y_t - h_t - W f_t |^2 + mu |W - W_0|^2,   mu as in `Ridge`

    y: the dense model's residual stream after the last of these dropped sublayers; h: the stream
    before k and f the input of its projection, both in the model with all drops and refits before
    it. So each refit also corrects the error of those before it. The sublayers that are dropped
    before any other have nothing to refit.

    Args:
        stream: the layer stream of the dense model; its model is changed.
        method: the merging method, whose schedule drops sublayers.
        plan: the plan of the dense model.
        target: the depth whose cost is reached.

    Returns:
        The plan with the drops, and the refitted tensors as its downstream refit.
    """
    schedule, adapter, processes = method.schedule, stream.adapter, stream.processes
    assert isinstance(schedule, SublayerSchedule)
    stream.embed()
    stream.advance(0, adapter.num_layers - 1)
    drops = processes.broadcast(schedule.dropped(stream, method, target))
    refits = method.refit.active
    if refits:
        stream.snapshot_dense()
    ends = ends_of_drops(adapter.layout.layers, drops)
    found: dict[str, Tensor] = {}
    for index, layout in enumerate(adapter.layout.layers):
        if zero_dropped(adapter, drops, index):
            stream.invalidate_from(index)
        for sublayer in layout:
            end = ends.get((index, sublayer.name))
            if end is None or not refits or sublayer.kind not in method.refit.sublayers:
                continue
            if stream.valid < index:
                stream.advance(stream.valid, index - 1)
            solved = processes.broadcast(_refitted(stream, method, index, sublayer, end))
            adapter.write(index, solved)
            stream.invalidate_from(index)
            found |= {f"{index}/{name}": tensor for name, tensor in solved.items()}
    passes = round(processes.reduced(stream.layer_passes), 1)
    provenance = {**plan.provenance, "layer_passes": passes}
    return replace(plan, dropped=drops, downstream=SolvedTensors(found), provenance=provenance)


def ends_of_drops(layouts: Sequence[LayerLayout], drops: SublayerDrops) -> dict[Place, Place]:
    """The last of the dropped sublayers that follow a sublayer that is left, by that sublayer."""
    gone = {(dropped.layer, dropped.kind) for dropped in drops.sublayers}
    found: dict[Place, Place] = {}
    left: Place | None = None
    for index, layout in enumerate(layouts):
        for sublayer in layout:
            place = index, sublayer.name
            if (index, sublayer.kind) not in gone:
                left = place
            elif left is not None:
                found[left] = place
    return found


def _refitted(
    stream: LayerStream, method: Combination, index: int, sublayer: Sublayer, end: Place
) -> LayerState:
    """The output projection of a sublayer, fitted to the dense model's states after `end`."""
    targets = _StatesAfterDrops(stream, index, end, method.refit.weights)
    sources = source_layers_of(stream.adapter, [index], method.operator, "mean", [1.0], {})
    refit = replace(method.refit, sublayers=[sublayer.kind])
    solved: LayerState = refit.solve(targets, sources)
    return solved


class _StatesAfterDrops(ReconstructionTargets):
    """The dense model's residual stream after a sublayer, as the target of an earlier one.

    Args:
        stream: has the boundary before layer `index`, and a snapshot of the dense model's.
        index: the layer of the sublayer that is refitted.
        end: the last dropped sublayer after it; its layer is that layer, or has not changed yet.
        weighting: token weighting.
    """

    def __init__(self, stream: LayerStream, index: int, end: Place, weighting: Weighting) -> None:
        super().__init__(stream, index, index, original=end[0], weighting=weighting)
        self._end = end

    def __iter__(self) -> Iterator[TargetBatch]:
        """Batches of this process's windows, in order; sums over them need `all_reduce`."""
        return (_BatchAfterDrops(self, number) for number in self._numbers)

    def output(self, rows: slice) -> States:
        """The target of one batch."""
        index, name = self._end
        adapter, layout = self.stream.adapter, self.stream.adapter.layer_layout(index)
        if name == layout.last.name:
            return self.stream.dense(index + 1, rows)
        states = self.stream.dense(index, rows)
        keywords = self.stream.keywords(len(states), index)
        return states_after(adapter.layer(index), layout, layout.sublayer(name), states, keywords)


class _BatchAfterDrops(TargetBatch):
    """A batch of one sublayer: all that is missing after it is what it should add."""

    def _update(self, sublayer: Sublayer, before: States) -> States:
        return self.output - before
