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
from come.merge.alignment import aligns, input_maps
from come.merge.normed_output import scaled_features
from come.merge.output_map import equations
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import Refit
from come.merge.source_layers import UnitSolution
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.stacked_map import StackedMap
from come.merge.units import by_layer
from come.merge.work import SpanSize, Work
from come.models.layer_state import LayerState
from come.models.layout import Sublayer, Unit
from come.models.sublayers import States, hidden_features


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
        inputs: P_i by the norm's module (see `come.merge.alignment`); empty without alignment.
    """

    state: LayerState
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def module(self, targets: ReconstructionTargets) -> nn.Module:
        """The layer as a module that is not part of the model."""
        adapter = targets.stream.adapter
        layer = adapter.copy_layer(targets.place, self.state)
        for norm, change in self.inputs.items():
            layer.set_submodule(norm, AlignedNorm(layer.get_submodule(norm), change))
        return layer


class AlignedNorm(nn.Module):
    """A norm followed by a linear map P, which is applied in float32 or wider."""

    def __init__(self, norm: nn.Module, change: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.change = change

    @property
    def weight(self) -> Tensor:
        """The norm's weight, whose dtype some layers convert their input to."""
        weight: Tensor = self.norm.get_parameter("weight")
        return weight

    def forward(self, states: Tensor) -> Tensor:
        """P n(x)."""
        normed = self.norm(states)
        wide = torch.promote_types(normed.dtype, torch.float32)
        return (normed.to(wide) @ self.change.to(normed.device, wide).T).to(normed)


@torch.no_grad()
def select_units_jointly(
    span: LayerSpan, rule: UnitRule, *, solves: bool = False
) -> UnitAllocation:
    """Selects a span's units sublayer by sublayer, each given the kept units of those before it.

    If the refit aligns input projections, units are selected with aligned ones.

    Args:
        span: a span with reconstruction targets.
        rule: selects the kept units of one sublayer.
        solves: whether the allocation includes the solutions for the kept units.

    Returns:
        The kept units, `span.unit_counts` of each kind; shares are those of the kept units of the
        last sublayer.
    """
    targets, adapter, align = span.targets, span.stream.adapter, span.refit.align
    ratio, layout = joint_lambda(span.refit), span.layout
    # Any allocation works: only the source layers are read.
    undecided = UnitAllocation([1 / span.size] * span.size)
    layers = [SourceLayer(state) for state in span.sources(undecided).layers]
    kept: dict[Unit, list[list[int]]] = {}
    solved: dict[Unit, UnitSolution] = {}
    residual = Residual(span)
    for sublayer in layout:
        changes: list[Tensor] = []
        if align is not None and sublayer.norm and aligns(sublayer):
            norms = [adapter.copy_norm(targets.place, sublayer, layer.state) for layer in layers]
            read = partial(residual.read, sublayer)
            changes = input_maps(targets, sublayer, norms[0], norms, read, align)
            layers = [
                SourceLayer(layer.state, {sublayer.norm.module: change})
                for layer, change in zip(layers, changes, strict=True)
            ]
        size, keep = sublayer.columns, span.unit_counts[sublayer.unit]
        last = sublayer == layout.last
        dtype = torch.float64  # the solution is used, not only the selection
        if last:
            bias = f"{sublayer.output}.bias" in adapter.roles(targets.place)
            dtype = choice_dtype(span.size * sublayer.count, ratio, bias=bias)
        features = Features(targets, sublayer, layers, residual, hold=not last)
        sums = stacked_equations(features, dtype)
        penalty = ratio * sums.mean_diagonal()
        initial = StackedMap(targets, sublayer)
        units, found = rule.choose(sums, initial, penalty, keep, size, solves or not last)
        kept[sublayer.unit] = by_layer(units, sublayer.count, span.size)
        if found is not None:
            solved[sublayer.unit] = UnitSolution(changes, found)
        if not last:
            assert found is not None
            columns = [unit_columns(chosen, size) for chosen in kept[sublayer.unit]]
            residual.after[sublayer.name] = states_after_kept(features, found, columns)
    counts = [len(layer) for layer in kept[layout.last.unit]]
    shares = [count / sum(counts) for count in counts]
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


class Residual:
    """The residual stream inside the merged layer, as far as its units are selected.

    Attributes:
        after: the stream after each sublayer, [windows, seq, hidden], in main memory.
    """

    def __init__(self, span: LayerSpan) -> None:
        self._layout = span.layout
        self.after: dict[str, Float[Tensor, "windows seq hidden"]] = {}

    def read(self, sublayer: Sublayer, batch: TargetBatch) -> States:
        """The stream that a sublayer reads."""
        return self._at(self._layout.read_after(sublayer), batch)

    def before(self, sublayer: Sublayer, batch: TargetBatch) -> States:
        """The stream that a sublayer's output is added to."""
        earlier = self._layout.before(sublayer)
        return self._at(earlier[-1] if earlier else None, batch)

    def _at(self, sublayer: Sublayer | None, batch: TargetBatch) -> States:
        if sublayer is None:
            return batch.states
        return self.after[sublayer.name][batch.rows].to(batch.states.device)


class Features:
    """The inputs of a sublayer's output projection, in all layers on the span's input.

    Where a norm follows the projection, they are divided by the root mean square of its output.

    Args:
        targets: reconstruction targets of the span.
        sublayer: the sublayer.
        layers: the layers of the span.
        residual: the residual stream inside the merged layer, up to this sublayer.
        hold: whether the features are cached in main memory, for a second read.
    """

    def __init__(
        self,
        targets: ReconstructionTargets,
        sublayer: Sublayer,
        layers: Sequence[SourceLayer],
        residual: Residual,
        hold: bool = False,
    ) -> None:
        self.targets = targets
        self.sublayer = sublayer
        self.layers = layers
        self.residual = residual
        self._hold = hold
        self._held: dict[tuple[int, int], Tensor] = {}

    def of(self, number: int, module: nn.Module | None, batch: TargetBatch) -> Tensor:
        """Features of layer `number` on a batch, [batch, seq, width]; `module`: None if cached."""
        stream = self.targets.stream
        if (number, batch.number) in self._held:
            return self._held[number, batch.number].to(stream.adapter.device)
        assert module is not None
        keywords = self.targets.keywords(len(batch.states))
        read = self.residual.read(self.sublayer, batch)
        found = hidden_features(module, self.targets.layout, self.sublayer, read, keywords)
        found = scaled_features(module, self.sublayer, found)
        if self._hold:
            self._held[number, batch.number] = found.cpu()
        return found

    def missing(self, batch: TargetBatch) -> Tensor:
        """What the output projection should give, [batch, seq, hidden]."""
        return batch.missing(self.sublayer, self.residual.before(self.sublayer, batch))


@torch.no_grad()
def stacked_equations(features: Features, dtype: torch.dtype = torch.float64) -> Equations:
    """The least-squares problem of all units of a sublayer, with all layers on the span's input.

    In the dual form, only one of the layers is in memory at a time.

    Returns:
        The equations from the features to what the sublayer should add. For the last sublayer that
        is the remaining difference from the target output, for the others what the sublayers of
        all layers add.
    """
    targets, sublayer, layers = features.targets, features.sublayer, features.layers
    stream, width = targets.stream, len(layers) * sublayer.width
    bias = f"{sublayer.output}.bias" in stream.adapter.roles(targets.place)
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
def states_after_kept(
    features: Features, found: Map, columns: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, "windows seq hidden"]:
    """The residual stream after a sublayer with its kept units, in main memory.

    Args:
        features: the features of all layers, cached.
        found: the output projection of the kept features.
        columns: kept features of every layer.

    Returns:
        The states; only the rows of this process's windows are set.
    """
    targets, stream = features.targets, features.targets.stream
    shape = (*stream.windows.shape, stream.adapter.config.hidden_size)
    states = torch.empty(shape, dtype=stream.adapter.model.dtype)
    weights = found.weight.split([len(chosen) for chosen in columns], dim=1)
    factor = features.sublayer.factor
    for batch in targets:
        after = features.residual.before(features.sublayer, batch).cpu()
        for number, (weight, chosen) in enumerate(zip(weights, columns, strict=True)):
            if len(chosen):
                read = features.of(number, None, batch)[..., chosen.to(weight.device)]
                after = after + (read @ (factor * weight).to(read).T).cpu()
        states[batch.rows] = after
    return states if found.bias is None else states + (factor * found.bias).to(states)


def joint_lambda(refit: Refit) -> float:
    """The relative penalty for unit selection: the refit's lambda, or 0.1 if that is "auto"."""
    return 0.1 if isinstance(refit.lambda_, str) else refit.lambda_
