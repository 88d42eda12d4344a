"""Joint unit selection: all units of a span as inputs of one stacked output projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.linalg.dual import Dual
from come.linalg.equations import DUAL, Equations, Map, choice_dtype, unit_columns
from come.merge.alignment import input_maps
from come.merge.output_map import equations
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import Refit
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.work import SpanSize, Work
from come.models.adapter import UNITS, Unit
from come.models.layer_state import LayerState
from come.models.sublayers import States, run_attention, run_mlp


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


@dataclass(frozen=True)
class SourceLayer:
    """A layer of a span that reads the input of the span: n_i(x_i) is replaced by P_i n(x).

    Attributes:
        state: its tensors, as the operator reads them.
        inputs: P_i of the units in question (see `come.merge.alignment`); empty without alignment.
    """

    state: LayerState
    inputs: Mapping[Unit, Tensor] = field(default_factory=dict)

    def module(self, targets: ReconstructionTargets) -> nn.Module:
        """The layer as a module that is not part of the model."""
        adapter = targets.stream.adapter
        layer = adapter.copy_layer(targets.first, self.state)
        for unit, change in self.inputs.items():
            norm = layer.get_submodule(adapter.norm(unit))
            layer.set_submodule(adapter.norm(unit), AlignedNorm(norm, change))
        return layer


class AlignedNorm(nn.Module):
    """A norm followed by a linear map P, which is applied in float32 or wider."""

    def __init__(self, norm: nn.Module, change: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.change = change

    def forward(self, states: Tensor) -> Tensor:
        """P n(x)."""
        normed = self.norm(states)
        wide = torch.promote_types(normed.dtype, torch.float32)
        return (normed.to(wide) @ self.change.to(normed.device, wide).T).to(normed)


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
    ratio = joint_lambda(group.refit)
    # Any allocation works: only the source layers are read.
    undecided = UnitAllocation([1 / group.size] * group.size)
    layers = [SourceLayer(state) for state in group.sources(undecided).layers]
    kept: dict[Unit, list[list[int]]] = {}
    middle: Tensor | None = None
    for unit in UNITS:
        if align is not None:
            norms = [adapter.copy_norm(unit, layer.state) for layer in layers]
            maps = input_maps(targets, unit, norms[0], norms, partial(_read, middle), align)
            layers = [
                SourceLayer(layer.state, {unit: change})
                for layer, change in zip(layers, maps, strict=True)
            ]
        count, size = adapter.unit_counts[unit], adapter.columns_per_unit(unit)
        last = unit == UNITS[-1]
        dtype = torch.float64  # the map of the kept head outputs is solved too
        if last:
            bias = len(adapter.output_tensors(unit)) > 1
            dtype = choice_dtype(group.size * count, ratio, bias=bias)
        sums = stacked_equations(targets, unit, layers, middle, dtype)
        initial = stacked_map(targets, unit)
        penalty = ratio * sums.mean_diagonal()
        units = rule.choose(sums, initial, penalty, count, size, last)
        kept[unit] = by_layer(units, count, group.size)
        if not last:
            columns = unit_columns(units, size).to(adapter.device)
            own = Map(initial.weight[:, columns], initial.bias)
            found = rule.kept_map(sums, own, columns, penalty)
            of_layers = [unit_columns(chosen, size) for chosen in kept[unit]]
            middle = after_attention(targets, layers, found, of_layers)
    total = adapter.unit_counts["channel"]
    return UnitAllocation([len(layer) / total for layer in kept["channel"]], kept)


def joint_work(size: SpanSize) -> Work:
    """What the joint selection takes, without the choice itself and without alignment."""
    heads = size.layers * size.heads
    sums = size.sums(heads, size.hidden, DUAL) + size.sums(
        size.width, size.hidden, DUAL, size.itemsize
    )
    copies = size.layer_bytes * (1 if size.dual(size.width, DUAL) else size.layers)
    beside = Work(bytes=sums.bytes + copies)
    return sums + beside + size.inverse(heads) + size.passes * (2 * size.layers)


def stacked_map(targets: ReconstructionTargets, unit: Unit) -> Map:
    """The output projections of the span side by side, W = [W_1 ... W_m]; biases are summed.

    The weight is stored by columns, so that least squares by tokens need no copy of it.
    """
    adapter = targets.stream.adapter
    layers = range(targets.first, targets.last + 1)
    name, *bias = adapter.output_tensors(unit)
    states = [adapter.layer_state(index) for index in layers]
    return Map(
        torch.cat([state[name].T for state in states]).T,
        torch.stack([state[bias[0]].double() for state in states]).sum(dim=0) if bias else None,
    )


@torch.no_grad()
def stacked_equations(
    targets: ReconstructionTargets,
    unit: Unit,
    layers: Sequence[SourceLayer],
    middle: Float[Tensor, "windows seq hidden"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Equations:
    """The problem of all units of one kind, with every layer reading the span's input.

    In its form by tokens, only one of the layers is in memory at a time.

    Args:
        targets: reconstruction targets of the span.
        unit: the kind of unit.
        layers: the layers of the span.
        middle: for MLP channels, the residual stream after the kept attention.
        dtype: of the normal equations.

    Returns:
        For KV groups, the equations from head outputs to what the span's attention adds. For MLP
        channels, the equations from hidden activations, on the residual stream after the kept
        attention, to the remaining difference from the target output.
    """
    stream, adapter = targets.stream, targets.stream.adapter
    width = len(layers) * adapter.unit_counts[unit] * adapter.columns_per_unit(unit)
    bias = len(adapter.output_tensors(unit)) > 1
    sums = equations(width, stream, bias=bias, eliminates=True, dtype=dtype)
    module: nn.Module | None = None
    if isinstance(sums, Dual):
        for number, layer in enumerate(layers):
            module = None  # frees the one before
            module = layer.module(targets)
            for batch in targets:
                features = _features(targets, unit, module, batch, middle).flatten(0, 1)
                tokens = batch.rows.start * batch.states.shape[1]
                sums.add_columns(number * features.shape[1], tokens, features, batch.weights)
                if number == 0:
                    sums.add_targets(_missing(unit, batch, middle).flatten(0, 1), batch.weights)
        sums.all_reduce(stream.processes)
        return sums
    modules = [layer.module(targets) for layer in layers]
    for batch in targets:
        side_by_side = [_features(targets, unit, module, batch, middle) for module in modules]
        features = torch.cat(side_by_side, dim=-1).flatten(0, 1)
        sums.add(features, _missing(unit, batch, middle).flatten(0, 1), batch.weights)
    sums.all_reduce(stream.processes)
    return sums


@torch.no_grad()
def after_attention(
    targets: ReconstructionTargets,
    layers: Sequence[SourceLayer],
    found: Map,
    columns: Sequence[Int[Tensor, " _"]],
) -> Float[Tensor, "windows seq hidden"]:
    """The residual stream after the kept attention, in main memory.

    Args:
        targets: reconstruction targets of the span.
        layers: the layers of the span.
        found: the output projection of the kept head outputs.
        columns: kept head outputs of every layer.

    Returns:
        The states of this process's windows; those of others are not set.
    """
    stream = targets.stream
    shape = (*stream.windows.shape, stream.adapter.config.hidden_size)
    middle = torch.empty(shape, dtype=stream.adapter.model.dtype)
    for batch in targets:
        middle[batch.rows] = batch.states.cpu()
    start, module = 0, None
    for layer, chosen in zip(layers, columns, strict=True):
        weight = found.weight[:, start : start + len(chosen)]
        start += len(chosen)
        if not len(chosen):
            continue
        module = None  # frees the one before
        module = layer.module(targets)
        for batch in targets:
            features = _features(targets, "kv_group", module, batch)[..., chosen.to(weight.device)]
            middle[batch.rows] += (features @ weight.to(features).T).cpu()
    return middle if found.bias is None else middle + found.bias.to(middle)


def _features(
    targets: ReconstructionTargets,
    unit: Unit,
    layer: nn.Module,
    batch: TargetBatch,
    middle: Tensor | None = None,
) -> Tensor:
    """Head outputs, or hidden activations of the MLP, of one layer on one batch."""
    stream = targets.stream
    keywords = stream.keywords(len(batch.states), targets.first)
    run = run_attention if unit == "kv_group" else run_mlp
    return run(stream.adapter, layer, _read(middle, batch), keywords)[0]


def _read(middle: Tensor | None, batch: TargetBatch) -> States:
    """The residual stream before the sublayer."""
    if middle is None:
        return batch.states
    return middle[batch.rows].to(batch.states.device)


def _missing(unit: Unit, batch: TargetBatch, middle: Tensor | None) -> States:
    """What the output projection has to add to the residual stream."""
    if unit == "kv_group":
        return batch.middle - batch.states
    return batch.output - _read(middle, batch)


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Splits unit indices of the stacked map into ascending lists per layer of `count` units."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def joint_lambda(refit: Refit) -> float:
    """The relative penalty for unit selection: the refit's lambda, or 0.1 if that is "auto"."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
