"""Joint unit selection: all units of a span as inputs of one stacked output projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from come.linalg.gram import Gram, Map
from come.merge.alignment import fold_input_transform, input_maps
from come.merge.output_map import equations, output_map
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import Refit
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.work import SpanSize, Work
from come.models.adapter import UNITS, Unit
from come.models.sublayers import States, run_attention, run_mlp

Solved = tuple[Map, Tensor]
"""The output projection of the kept attention, and its columns in the stacked projection."""

ChooseUnits = Callable[[Gram, Map, int, int], list[int]]
"""(Gram, stacked map of all units, number to keep, columns per unit) -> kept units, ascending."""

Refill = Callable[[Gram, Map, Tensor], Map]
"""(Gram, map of the kept units, their columns) -> the output projection to use for these units."""


@torch.no_grad()
def select_units_jointly(
    group: LayerSpan, choose: ChooseUnits, drive: Refill, align: float | None = None
) -> UnitAllocation:
    """Selects a span's units: first KV groups, then MLP channels given the kept attention.

    Args:
        group: a span with reconstruction targets.
        choose: selects the kept units of one kind.
        drive: gives the output projection of the kept attention, whose output is added to the
            residual stream that the MLP channels read.
        align: penalty of the input alignment that the refit will apply; None for no alignment.

    Returns:
        The kept units; shares are those of the kept MLP channels.
    """
    targets, adapter = group.targets, group.stream.adapter
    # Any allocation works: only the source layers are read.
    undecided = UnitAllocation([1 / group.size] * group.size)
    states = list(group.sources(undecided).layers)
    layers = [adapter.copy_layer(group.first, state) for state in states]
    kept: dict[Unit, list[list[int]]] = {}
    attention: Solved | None = None
    for unit in UNITS:
        initial = stacked_map(targets, unit)
        if align is not None:
            reads = partial(_read, targets, layers, attention)
            maps = input_maps(targets, unit, layers[0], layers, reads, align)
            for i, change in enumerate(maps):
                states[i] = fold_input_transform(adapter, unit, states[i], change)
                layers[i].load_state_dict(states[i])
        sums = stacked_gram(targets, unit, initial, layers, attention)
        count, size = adapter.unit_counts[unit], adapter.columns_per_unit(unit)
        units = choose(sums, initial, count, size)
        kept[unit] = by_layer(units, count, group.size)
        if unit == "kv_group":
            columns = unit_columns(units, size).to(sums.gram.device)
            own = Map(initial.weight[:, columns], initial.bias)
            attention = drive(sums, own, columns), columns
    total = adapter.unit_counts["channel"]
    return UnitAllocation([len(layer) / total for layer in kept["channel"]], kept)


def joint_work(size: SpanSize) -> Work:
    """What the joint selection takes, without the choice itself and without alignment."""
    heads = size.layers * size.heads
    sums = size.gram(heads, size.hidden) + size.gram(size.width, size.hidden)
    return sums + size.inverse(heads) + size.passes * (2 * size.layers)


def stacked_map(targets: ReconstructionTargets, unit: Unit) -> Map:
    """The output projections of the span side by side, W = [W_1 ... W_m]; biases are summed."""
    adapter = targets.stream.adapter
    layers = range(targets.first, targets.last + 1)
    maps = [output_map(adapter, adapter.layers[i], unit) for i in layers]
    biases = [part.bias for part in maps if part.bias is not None]
    return Map(
        torch.cat([part.weight for part in maps], dim=1),
        torch.stack(biases).sum(dim=0) if biases else None,
    )


@torch.no_grad()
def stacked_gram(
    targets: ReconstructionTargets,
    unit: Unit,
    initial: Map,
    layers: Sequence[nn.Module],
    attention: Solved | None = None,
) -> Gram:
    """Normal equations for all units of one kind, with every layer reading the span's input.

    Args:
        targets: reconstruction targets of the span.
        unit: the kind of unit.
        initial: `stacked_map` of these units.
        layers: the layers of the span, as the operator reads them.
        attention: for MLP channels, the kept attention before them.

    Returns:
        For KV groups, the equations from head outputs to what the span's attention adds. For MLP
        channels, the equations from hidden activations, on the residual stream after `attention`,
        to the remaining difference from the target output.
    """
    stream, adapter = targets.stream, targets.stream.adapter
    sums = equations(initial, adapter)
    for goal in targets:
        if unit == "kv_group":
            features, target = _heads(targets, layers, goal), goal.middle - goal.states
        else:
            middle = _read(targets, layers, attention, goal)
            keywords = stream.keywords(len(middle), targets.first)
            features = torch.cat(
                [run_mlp(adapter, layer, middle, keywords)[0] for layer in layers], dim=-1
            )
            target = goal.output - middle
        sums.add(features.flatten(0, 1), target.flatten(0, 1), goal.weights)
    return sums


def _heads(
    targets: ReconstructionTargets, layers: Sequence[nn.Module], goal: TargetBatch
) -> Tensor:
    """Head outputs of all layers side by side, computed on the span's input."""
    adapter = targets.stream.adapter
    keywords = targets.stream.keywords(len(goal.states), targets.first)
    return torch.cat(
        [run_attention(adapter, layer, goal.states, keywords)[0] for layer in layers], dim=-1
    )


def _read(
    targets: ReconstructionTargets,
    layers: Sequence[nn.Module],
    attention: Solved | None,
    goal: TargetBatch,
) -> States:
    """The residual stream before the sublayer: the span's input plus the output of `attention`."""
    if attention is None:
        return goal.states
    found, columns = attention
    features = _heads(targets, layers, goal)[..., columns]
    added = features @ found.weight.to(features).T
    return goal.states + (added if found.bias is None else added + found.bias.to(features))


def unit_columns(units: list[int], size: int) -> Tensor:
    """Column indices of units that have `size` adjacent columns each, int64."""
    first = torch.as_tensor(units, dtype=torch.long) * size
    return (first[:, None] + torch.arange(size)).flatten()


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Splits unit indices of the stacked map into ascending lists per layer of `count` units."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def joint_lambda(refit: Refit) -> float:
    """The relative penalty for unit selection: the refit's lambda, or 0.1 if that is "auto"."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
