"""Reconstruction targets for the layer that replaces a span, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.merge.scales import SpanScale
from come.models.layout import LayerLayout, Sublayer, Unit
from come.models.sublayers import States, states_after
from come.models.width import with_units
from come.stream.stream import LayerStream

Target = Literal["dense", "current"]
Weighting = Literal["relative", "equal"]


@dataclass(frozen=True)
class TargetBatch:
    """One batch of a layer's input and reconstruction targets; tensors are computed on access.

    Attributes:
        targets: the targets of all windows.
        number: the batch's number, from 0.
    """

    targets: ReconstructionTargets
    number: int

    @property
    def windows(self) -> Int[Tensor, " batch"]:
        """Indices of the windows, counted from 0 over all batches."""
        return torch.arange(self.rows.start, self.rows.stop)

    @cached_property
    def states(self) -> States:
        """The layer's input: the residual stream of the current model."""
        return self.targets.stream.boundary(self.targets.first, self.rows)

    @cached_property
    def output(self) -> States:
        """The target of the layer's output."""
        return self.targets.output(self.rows)

    @property
    def unscaled(self) -> States:
        """The target after the last sublayer, before the layer's scale."""
        return self.output / self.targets.scale.whole

    @property
    def weights(self) -> Float[Tensor, " tokens"]:
        """Token weights, [batch * seq]."""
        return token_weights(self.output, self.targets.weighting)

    def missing(self, sublayer: Sublayer, before: States) -> States:
        """What a sublayer's output projection should give, [batch, seq, hidden].

        Args:
            sublayer: the sublayer.
            before: the residual stream that its output is added to, times its factor.
        """
        return self._update(sublayer, before) / sublayer.factor

    def _update(self, sublayer: Sublayer, before: States) -> States:
        """What a sublayer should add to the residual stream."""
        layout = self.targets.layout
        if sublayer == layout.last:
            return self.unscaled - before
        found = before.clone()
        earlier = layout.before(sublayer)
        starts = self._source_states(earlier[-1] if earlier else None)
        ends, factors = self._source_states(sublayer), self.targets.scale.factors
        for start, end, factor in zip(starts, ends, factors, strict=True):
            found += factor * (end - start)
        return found - before

    def source_inputs(self, sublayer: Sublayer) -> list[States]:
        """The residual stream that a sublayer reads in every layer of the current model."""
        return self._source_states(self.targets.layout.read_after(sublayer))

    def _source_states(self, sublayer: Sublayer | None) -> list[States]:
        """The residual stream of every layer after a sublayer; None for the layer's input."""
        targets, stream = self.targets, self.targets.stream
        if sublayer is None:
            layers = range(targets.first, targets.last + 1)
            return [stream.boundary(index, self.rows) for index in layers]
        device = stream.adapter.device
        return [states[self.number].to(device) for states in targets.source_states(sublayer)]

    @property
    def rows(self) -> slice:
        """The windows of the batch in the stream."""
        return self.targets.stream.batches[self.number]


class ReconstructionTargets:
    """Reconstruction targets of a span of layers a..b of the current model.

        after a sublayer s:     h + sum_i f_i s_i(h_{i-1}),    h the merged layer's stream before it
        after the last one:     h_b / c, of the current or of the dense model

    s_i is what sublayer s of layer i adds to its residual stream in the current model. With h_b of
    the dense model, the fit also corrects the errors of earlier merges. c and f_i are 1 unless
    layers multiply the residual stream (see `come.merge.scales`).

    Args:
        stream: has boundaries a .. b + 1; for dense targets also a snapshot of the dense model's.
        first: a.
        last: b.
        original: the original layer whose output is the dense model's h_b.
        place: the layer whose kind and arguments the merged layer has; None for a.
        target: "dense" or "current".
        weighting: token weighting, "relative" for 1 / mean_channels(output^2), or "equal".

    Attributes:
        narrower: units of the merged layer, by kind, where they are fewer than a layer has.
    """

    def __init__(
        self,
        stream: LayerStream,
        first: int,
        last: int,
        *,
        original: int,
        place: int | None = None,
        target: Target = "dense",
        weighting: Weighting = "relative",
    ) -> None:
        self.stream = stream
        self.first = first
        self.last = last
        self.original = original
        self.place = first if place is None else place
        self.target: Target = target
        self.weighting: Weighting = weighting
        self.narrower: Mapping[Unit, int] = {}
        self.input_maps: dict[tuple[str, float], list[Tensor]] = {}  # cached, by norm and lambda
        self._source_states: dict[str, list[dict[int, States]]] = {}  # by sublayer

    def __iter__(self) -> Iterator[TargetBatch]:
        """Batches of this process's windows, in order; sums over them need `all_reduce`."""
        return (TargetBatch(self, number) for number in self._numbers)

    @property
    def _numbers(self) -> Sequence[int]:
        """The numbers of this process's batches."""
        return self.stream.processes.shard(range(len(self.stream.batches)))

    @cached_property
    def scale(self) -> SpanScale:
        """The scales of the span's layers in the merged layer."""
        return SpanScale.of(self.stream.adapter, range(self.first, self.last + 1))

    @property
    def layout(self) -> LayerLayout:
        """The sublayers of the merged layer."""
        layout = self.stream.adapter.layer_layout(self.place)
        return with_units(layout, self.narrower)

    def with_units(self, narrower: Mapping[Unit, int]) -> ReconstructionTargets:
        """The same targets, for a layer with fewer units; those left out stay as many."""
        found = copy(self)
        found.narrower = narrower
        return found

    def keywords(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of the merged layer for a batch of `batch` windows."""
        return self.stream.keywords(batch, self.place)

    def source_states(self, sublayer: Sublayer) -> list[dict[int, States]]:
        """The residual stream of every layer after a sublayer, by batch number, in main memory."""
        if sublayer.name in self._source_states:
            return self._source_states[sublayer.name]
        stream, adapter = self.stream, self.stream.adapter
        found: list[dict[int, States]] = []
        for index in range(self.first, self.last + 1):
            layer, layout, after = adapter.layer(index), adapter.layer_layout(index), {}
            own = layout.sublayer(sublayer.name)
            for number in self._numbers:
                states = stream.boundary(index, stream.batches[number])
                keywords = stream.keywords(len(states), index)
                after[number] = states_after(layer, layout, own, states, keywords).cpu()
            found.append(after)
        adapter.release()
        self._source_states[sublayer.name] = found
        return found

    def release(self) -> None:
        """Frees the states inside the source layers; they are recomputed on access."""
        self._source_states.clear()
        self.input_maps.clear()

    def output(self, rows: slice) -> States:
        """The target output of one batch."""
        if self.target == "dense":
            return self.stream.dense(self.original + 1, rows)
        return self.stream.boundary(self.last + 1, rows)


def token_weights(output: States, weighting: Weighting) -> Float[Tensor, " tokens"]:
    """The weight of every token: 1 / mean_channels(output^2), or 1.

    A few tokens, above all the first of a window, have hidden states a hundred times larger than
    the rest. Downstream layers normalise them, so the relative error is what matters.
    """
    flat = output.flatten(0, -2).float()
    if weighting == "equal":
        return torch.ones_like(flat[:, 0])
    return flat.square().mean(dim=1).clamp_min(1e-12).reciprocal()
