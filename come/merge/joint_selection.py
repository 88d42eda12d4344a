"""All units of a group as the inputs of one wide output map."""

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
from come.merge.span import Group, UnitAllocation
from come.models.adapter import UNITS, Unit
from come.models.sublayers import States, run_attention, run_mlp

Chosen = tuple[Map, Tensor]
"""An attention map, and the columns of the wide one that it reads."""

Choose = Callable[[Gram, Map, int, int], list[int]]
"""(equations, map of all units, how many to keep, columns of a unit) -> kept units, ascending."""

Drive = Callable[[Gram, Map, Tensor], Map]
"""(equations, the kept units' map, their columns) -> the map through which they drive."""


@torch.no_grad()
def select_units_jointly(
    group: Group, choose: Choose, drive: Drive, align: float | None = None
) -> UnitAllocation:
    """The units of a group that `choose` keeps: KV groups, then FFN channels behind them.

    Args:
        group: with goals.
        choose: which units of a kind stay.
        drive: what the kept attention adds to the residual stream that FFN channels read.
        align: penalty of the alignment of input maps that the refit will do; None for none.

    Returns:
        The kept units; shares are those of the kept FFN channels.
    """
    assert group.goals is not None
    goals, adapter = group.goals(), group.stream.adapter
    undecided = UnitAllocation(
        [1 / group.size] * group.size
    )  # what the operator reads hangs on no split
    states = list(group.pieces(undecided).layers)
    layers = [adapter.copy_layer(group.first, state) for state in states]
    kept: dict[Unit, list[list[int]]] = {}
    attention: Chosen | None = None
    for unit in UNITS:
        prior = stacked_map(goals, unit)
        if align is not None:
            reads = partial(_read, goals, layers, attention)
            maps = input_maps(goals, unit, layers[0], layers, reads, align)
            for i, change in enumerate(maps):
                states[i] = fold_input_transform(adapter, unit, states[i], change)
                layers[i].load_state_dict(states[i])
        sums = stacked_gram(goals, unit, prior, layers, attention)
        count, size = adapter.unit_counts[unit], adapter.columns_per_unit(unit)
        units = choose(sums, prior, count, size)
        kept[unit] = by_layer(units, count, group.size)
        if unit == "kv_group":
            columns = unit_columns(units, size).to(sums.gram.device)
            own = Map(prior.weight[:, columns], prior.bias)
            attention = drive(sums, own, columns), columns
    total = adapter.unit_counts["channel"]
    return UnitAllocation([len(layer) / total for layer in kept["channel"]], kept)


def stacked_map(goals: ReconstructionTargets, unit: Unit) -> Map:
    """The output maps of the group's layers side by side, W = [W_1 ... W_m]; biases are added."""
    adapter = goals.stream.adapter
    layers = range(goals.first, goals.last + 1)
    maps = [output_map(adapter, adapter.layers[i], unit) for i in layers]
    biases = [part.bias for part in maps if part.bias is not None]
    return Map(
        torch.cat([part.weight for part in maps], dim=1),
        torch.stack(biases).sum(dim=0) if biases else None,
    )


@torch.no_grad()
def stacked_gram(
    goals: ReconstructionTargets,
    unit: Unit,
    prior: Map,
    layers: Sequence[nn.Module],
    attention: Chosen | None = None,
) -> Gram:
    """Normal equations of all units of one kind of the group, on the input of the group.

    Args:
        goals: of the group.
        unit: the kind of unit.
        prior: `stacked_map` of these units.
        layers: of the group, as the operator reads them.
        attention: for FFN channels, the attention in front of them.

    Returns:
        Attention: head outputs to what the group's attention adds. FFN: activations on the residual
        stream behind `attention` to what is then missing from the group's output.
    """
    stream, adapter = goals.stream, goals.stream.adapter
    sums = equations(prior, adapter)
    for goal in goals:
        if unit == "kv_group":
            features, wanted = _heads(goals, layers, goal), goal.middle - goal.states
        else:
            middle = _read(goals, layers, attention, goal)
            keywords = stream.keywords(len(middle), goals.first)
            features = torch.cat(
                [run_mlp(adapter, layer, middle, keywords)[0] for layer in layers], dim=-1
            )
            wanted = goal.output - middle
        sums.add(features.flatten(0, 1), wanted.flatten(0, 1), goal.weights)
    return sums


def _heads(goals: ReconstructionTargets, layers: Sequence[nn.Module], goal: TargetBatch) -> Tensor:
    """Head outputs of all layers side by side, on the group's input."""
    adapter = goals.stream.adapter
    keywords = goals.stream.keywords(len(goal.states), goals.first)
    return torch.cat(
        [run_attention(adapter, layer, goal.states, keywords)[0] for layer in layers], dim=-1
    )


def _read(
    goals: ReconstructionTargets,
    layers: Sequence[nn.Module],
    attention: Chosen | None,
    goal: TargetBatch,
) -> States:
    """The residual stream in front of the block: the group's input, and what `attention` adds."""
    if attention is None:
        return goal.states
    found, columns = attention
    features = _heads(goals, layers, goal)[..., columns]
    added = features @ found.weight.to(features).T
    return goal.states + (added if found.bias is None else added + found.bias.to(features))


def unit_columns(units: list[int], size: int) -> Tensor:
    """The columns of units of `size` adjacent ones, int64."""
    first = torch.as_tensor(units, dtype=torch.long) * size
    return (first[:, None] + torch.arange(size)).flatten()


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Units of the wide map as ascending lists of each layer's own, `count` a layer."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def joint_lambda(refit: Refit) -> float:
    """The relative penalty with which units are chosen: the refit's, with "auto" 0.1."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
