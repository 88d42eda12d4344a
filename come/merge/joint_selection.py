"""Joint unit selection: all units of a span as inputs of one stacked output projection."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from come.linalg.equations import Equations, Map, unit_columns
from come.merge.alignment import fold_input_transform, input_maps, input_tensors
from come.merge.output_map import equations, output_map
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import Refit
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.work import SpanSize, Work
from come.models.adapter import UNITS, Unit
from come.models.sublayers import States, run_attention, run_mlp

Solved = tuple[Map, Tensor]
"""The output projection of the kept attention, and its columns in the stacked projection."""


@runtime_checkable
class UnitRule(Protocol):
    """Chooses units by the least-squares problem of all units of a span."""

    def choose(
        self, sums: Equations, initial: Map, penalty: float, keep: int, size: int, last: bool
    ) -> list[int]:
        """The kept units, ascending.

        Args:
            sums: the problem of all units.
            initial: the stacked map of all units.
            penalty: the refit's, absolute.
            keep: how many to keep.
            size: columns of a unit.
            last: whether the problem is not read again.
        """
        ...

    def kept_map(self, sums: Equations, own: Map, columns: Tensor, penalty: float) -> Map:
        """The output projection of the kept units, whose columns and own map are given."""
        ...


@torch.no_grad()
def select_units_jointly(group: LayerSpan, rule: UnitRule) -> UnitAllocation:
    """Selects a span's units: first KV groups, then MLP channels given the kept attention.

    MLP channels read the residual stream after the kept attention. Units are those of layers with
    aligned input maps, if the refit aligns them.

    Args:
        group: a span with reconstruction targets.
        rule: selects the kept units of one kind.

    Returns:
        The kept units; shares are those of the kept MLP channels.
    """
    targets, adapter, align = group.targets, group.stream.adapter, group.refit.align
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
                adapter.assign(layers[i], {n: states[i][n] for n in input_tensors(adapter, unit)})
        sums = stacked_equations(targets, unit, initial, layers, attention)
        penalty = joint_lambda(group.refit) * sums.mean_diagonal()
        count, size = adapter.unit_counts[unit], adapter.columns_per_unit(unit)
        last = unit == UNITS[-1]
        units = rule.choose(sums, initial, penalty, count, size, last)
        kept[unit] = by_layer(units, count, group.size)
        if not last:
            columns = unit_columns(units, size).to(adapter.device)
            own = Map(initial.weight[:, columns], initial.bias)
            attention = rule.kept_map(sums, own, columns, penalty), columns
    total = adapter.unit_counts["channel"]
    return UnitAllocation([len(layer) / total for layer in kept["channel"]], kept)


def joint_work(size: SpanSize) -> Work:
    """What the joint selection takes, without the choice itself and without alignment."""
    heads = size.layers * size.heads
    sums = size.sums(heads, size.hidden) + size.sums(size.width, size.hidden)
    return sums + size.inverse(heads) + size.passes * (2 * size.layers)


def stacked_map(targets: ReconstructionTargets, unit: Unit) -> Map:
    """The output projections of the span side by side, W = [W_1 ... W_m]; biases are summed."""
    adapter = targets.stream.adapter
    layers = range(targets.first, targets.last + 1)
    maps = [output_map(adapter, adapter.layer(i), unit) for i in layers]
    biases = [part.bias for part in maps if part.bias is not None]
    return Map(
        torch.cat([part.weight for part in maps], dim=1),
        torch.stack(biases).sum(dim=0) if biases else None,
    )


@torch.no_grad()
def stacked_equations(
    targets: ReconstructionTargets,
    unit: Unit,
    initial: Map,
    layers: Sequence[nn.Module],
    attention: Solved | None = None,
) -> Equations:
    """The problem of all units of one kind, with every layer reading the span's input.

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
    sums = equations(initial, adapter, stream.tokens)
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


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Splits unit indices of the stacked map into ascending lists per layer of `count` units."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def joint_lambda(refit: Refit) -> float:
    """The relative penalty for unit selection: the refit's lambda, or 0.1 if that is "auto"."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
