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
from come.merge.source_layers import UnitSolution
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.stacked_map import StackedMap
from come.merge.work import SpanSize, Work
from come.models.adapter import UNITS, Unit
from come.models.layer_state import LayerState
from come.models.sublayers import States, head_outputs, hidden_activations


@runtime_checkable
class UnitRule(Protocol):
    """Selects units from the least-squares problem of all units of a span."""

    def choose(
        self,
        sums: Equations,
        initial: StackedMap,
        penalty: float,
        keep: int,
        size: int,
        solves: bool,
    ) -> tuple[list[int], Map | None]:
        """The kept units, ascending, and their output projection.

        Args:
            sums: the problem of all units; the caller does not use it afterwards.
            initial: the stacked map of all units.
            penalty: the refit's penalty, absolute.
            keep: number of units to keep.
            size: columns per unit.
            solves: whether the output projection is needed; otherwise it may be None.
        """
        ...


@dataclass(frozen=True)
class SourceLayer:
    """A layer of a span, run on the span's input: P_i n(x) replaces n_i(x_i).

    Attributes:
        state: its tensors, as the operator reads them.
        inputs: P_i by kind of unit (see `come.merge.alignment`); empty without alignment.
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
def select_units_jointly(
    span: LayerSpan, rule: UnitRule, *, solves: bool = False
) -> UnitAllocation:
    """Selects a span's units: first KV groups, then MLP channels given the kept attention.

    MLP channels read the residual stream after the kept attention. If the refit aligns input
    projections, units are selected with aligned ones.

    Args:
        span: a span with reconstruction targets.
        rule: selects the kept units of one kind.
        solves: whether the allocation includes the solutions for the kept units of both kinds.

    Returns:
        The kept units, `span.unit_counts` of each kind; shares are those of the kept MLP channels.
    """
    targets, adapter, align = span.targets, span.stream.adapter, span.refit.align
    ratio = joint_lambda(span.refit)
    # Any allocation works: only the source layers are read.
    undecided = UnitAllocation([1 / span.size] * span.size)
    layers = [SourceLayer(state) for state in span.sources(undecided).layers]
    kept: dict[Unit, list[list[int]]] = {}
    solved: dict[Unit, UnitSolution] = {}
    post_attention: Tensor | None = None
    for unit in UNITS:
        changes: list[Tensor] = []
        if align is not None:
            norms = [adapter.copy_norm(unit, layer.state) for layer in layers]
            changes = input_maps(
                targets, unit, norms[0], norms, partial(_read, post_attention), align
            )
            layers = [
                SourceLayer(layer.state, {unit: change})
                for layer, change in zip(layers, changes, strict=True)
            ]
        count, size = adapter.unit_counts[unit], adapter.columns_per_unit(unit)
        keep = span.unit_counts[unit]
        last = unit == UNITS[-1]
        dtype = torch.float64  # the attention's solution is used, not only the selection
        if last:
            bias = len(adapter.output_tensors(unit)) > 1
            dtype = choice_dtype(span.size * count, ratio, bias=bias)
        read = Features(targets, unit, layers, post_attention, hold=not last)
        sums = stacked_equations(read, dtype)
        penalty = ratio * sums.mean_diagonal()
        initial = StackedMap(targets, unit)
        units, found = rule.choose(sums, initial, penalty, keep, size, solves or not last)
        kept[unit] = by_layer(units, count, span.size)
        if found is not None:
            solved[unit] = UnitSolution(changes, found)
        if not last:
            assert found is not None
            columns = [unit_columns(chosen, size) for chosen in kept[unit]]
            post_attention = post_attention_states(read, found, columns)
    total = span.unit_counts["channel"]
    shares = [len(layer) / total for layer in kept["channel"]]
    return UnitAllocation(shares, kept, solved if solves else {})


def joint_work(size: SpanSize) -> Work:
    """The work of the joint selection, without the selection rule and the alignment."""
    heads = size.layers * size.heads
    attention = size.sums(heads, size.hidden, DUAL)
    ffn = size.sums(size.width, size.hidden, DUAL, size.itemsize)
    held = 4.0 * size.tokens * heads
    copies = size.layer_bytes * (1 if size.dual(size.width, DUAL) else size.layers)
    memory = Work(bytes=max(attention.bytes + held, ffn.bytes) + copies)
    return attention + ffn + memory + size.inverse(heads) + size.passes * (2 * size.layers)


class Features:
    """Head outputs, or hidden activations of the MLP, of all layers on the span's input.

    Args:
        targets: reconstruction targets of the span.
        unit: kv_group for head outputs, channel for hidden activations.
        layers: the layers of the span.
        post_attention: for MLP channels, the residual stream after the kept attention.
        hold: whether the features are cached in main memory, for a second read.
    """

    def __init__(
        self,
        targets: ReconstructionTargets,
        unit: Unit,
        layers: Sequence[SourceLayer],
        post_attention: Float[Tensor, "windows seq hidden"] | None = None,
        hold: bool = False,
    ) -> None:
        self.targets = targets
        self.unit: Unit = unit
        self.layers = layers
        self.post_attention = post_attention
        self._hold = hold
        self._held: dict[tuple[int, int], Tensor] = {}

    def of(self, number: int, module: nn.Module | None, batch: TargetBatch) -> Tensor:
        """Features of layer `number` on a batch, [batch, seq, width]; `module`: None if cached."""
        stream = self.targets.stream
        if (number, batch.number) in self._held:
            return self._held[number, batch.number].to(stream.adapter.device)
        assert module is not None
        keywords = stream.keywords(len(batch.states), self.targets.first)
        run = head_outputs if self.unit == "kv_group" else hidden_activations
        found = run(stream.adapter, module, _read(self.post_attention, batch), keywords)
        if self._hold:
            self._held[number, batch.number] = found.cpu()
        return found

    def missing(self, batch: TargetBatch) -> Tensor:
        """The target update of the residual stream by the sublayer, [batch, seq, hidden]."""
        if self.unit == "kv_group":
            return batch.post_attention - batch.states
        return batch.output - _read(self.post_attention, batch)


@torch.no_grad()
def stacked_equations(features: Features, dtype: torch.dtype = torch.float64) -> Equations:
    """The least-squares problem of all units of one kind, with all layers on the span's input.

    In the dual form, only one of the layers is in memory at a time.

    Args:
        features: the features of the units.
        dtype: dtype of the normal equations.

    Returns:
        For KV groups, the equations from head outputs to what the span's attention adds. For MLP
        channels, the equations from hidden activations, on the residual stream after the kept
        attention, to the remaining difference from the target output.
    """
    targets, unit, layers = features.targets, features.unit, features.layers
    stream, adapter = targets.stream, targets.stream.adapter
    width = len(layers) * adapter.unit_counts[unit] * adapter.columns_per_unit(unit)
    bias = len(adapter.output_tensors(unit)) > 1
    sums = equations(width, stream, bias=bias, eliminates=True, dtype=dtype)
    module: nn.Module | None = None
    if isinstance(sums, Dual):
        for number, layer in enumerate(layers):
            module = None  # frees the previous one
            module = layer.module(targets)
            for batch in targets:
                found = features.of(number, module, batch).flatten(0, 1)
                tokens = batch.rows.start * batch.states.shape[1]
                sums.add_columns(number * found.shape[1], tokens, found, batch.weights)
                if number == 0:
                    sums.add_targets(features.missing(batch).flatten(0, 1), batch.weights)
        sums.all_reduce(stream.processes)
        return sums
    modules = [layer.module(targets) for layer in layers]
    for batch in targets:
        side_by_side = [features.of(i, module, batch) for i, module in enumerate(modules)]
        found = torch.cat(side_by_side, dim=-1).flatten(0, 1)
        sums.add(found, features.missing(batch).flatten(0, 1), batch.weights)
    sums.all_reduce(stream.processes)
    return sums


@torch.no_grad()
def post_attention_states(
    features: Features, found: Map, columns: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, "windows seq hidden"]:
    """The residual stream after the kept attention, in main memory.

    Args:
        features: head outputs of the span's layers, cached.
        found: the output projection of the kept head outputs.
        columns: kept head outputs of every layer.

    Returns:
        The states; only the rows of this process's windows are set.
    """
    targets, stream = features.targets, features.targets.stream
    shape = (*stream.windows.shape, stream.adapter.config.hidden_size)
    post_attention = torch.empty(shape, dtype=stream.adapter.model.dtype)
    weights = found.weight.split([len(chosen) for chosen in columns], dim=1)
    for batch in targets:
        after = batch.states.cpu()
        for number, (weight, chosen) in enumerate(zip(weights, columns, strict=True)):
            if len(chosen):
                read = features.of(number, None, batch)[..., chosen.to(weight.device)]
                after = after + (read @ weight.to(read).T).cpu()
        post_attention[batch.rows] = after
    return post_attention if found.bias is None else post_attention + found.bias.to(post_attention)


def _read(post_attention: Tensor | None, batch: TargetBatch) -> States:
    """The residual stream before the sublayer."""
    if post_attention is None:
        return batch.states
    return post_attention[batch.rows].to(batch.states.device)


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Splits unit indices of the stacked map into ascending lists per layer of `count` units."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def joint_lambda(refit: Refit) -> float:
    """The relative penalty for unit selection: the refit's lambda, or 0.1 if that is "auto"."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
