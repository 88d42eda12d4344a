"""A span of layers that will be merged: its statistics, and how to build and score a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from come.merge.apply import block_states, source_layers_of
from come.merge.operators.base import MergeOperator
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import Refit
from come.merge.sensitivity.base import SensitivityMetric
from come.merge.source_layers import SourceLayers, UnitSolution
from come.merge.unit_scores import UnitScores, unit_scores
from come.models.layout import LayerLayout, Unit
from come.models.surgery import Span
from come.statistics.layer_statistics import LayerStatistics
from come.stream.candidates import Candidate, losses, together
from come.stream.stream import LayerStream, Route


@dataclass(frozen=True)
class UnitAllocation:
    """How much of each layer of a span is kept, and which units.

    Attributes:
        shares: share rho of every layer, in depth order; >= 0, summing to 1.
        kept: kept units of every layer, ascending, by kind; empty if no units are chosen.
        solved: solutions for the kept units, by kind, if unit selection has computed them.
    """

    shares: list[float]
    kept: dict[Unit, list[list[int]]] = field(default_factory=dict)
    solved: dict[Unit, UnitSolution] = field(default_factory=dict)

    @classmethod
    def drop(cls, size: int, kept: int) -> UnitAllocation:
        """The whole layer at index `kept` of a span of `size` layers, and nothing of the others."""
        return cls([float(i == kept) for i in range(size)])


@dataclass(frozen=True)
class LayerSpan:
    """Layers of the stream's model that become one layer.

    Attributes:
        stream: hidden states at all boundaries of the current model.
        layers: the layers' positions in the stream's model, ascending.
        spans: original layers merged into each of them.
        statistics: calibration statistics of each of them.
        operator: how they become one layer.
        norms: how their norms are merged, "mean" or "fold".
        refit: how the merged layer is fitted to them.
        sensitivity: how their channels are scored.
        narrower: units that the new layer has, by kind, where these are fewer than a layer has.
        slot: index in the span of the layer whose kind and configuration the new layer has.
    """

    stream: LayerStream
    layers: Sequence[int]
    spans: Sequence[Span]
    statistics: Sequence[LayerStatistics]
    operator: MergeOperator
    norms: str
    refit: Refit
    sensitivity: SensitivityMetric
    narrower: Mapping[Unit, int] = field(default_factory=dict)
    slot: int = 0

    @property
    def unit_counts(self) -> dict[Unit, int]:
        """Units of the new layer, by kind."""
        return {**self.layout.unit_counts, **self.narrower}

    @property
    def layout(self) -> LayerLayout:
        """The sublayers of the new layer."""
        return self.stream.adapter.layer_layout(self.place)

    @property
    def place(self) -> int:
        """The layer whose kind and configuration the new layer has."""
        return self.layers[self.slot]

    @property
    def first(self) -> int:
        """The first layer."""
        return self.layers[0]

    @property
    def last(self) -> int:
        """The last layer, inclusive."""
        return self.layers[-1]

    @property
    def size(self) -> int:
        """Number of layers in the span."""
        return len(self.layers)

    @property
    def influences(self) -> list[float]:
        """Block influence of every layer."""
        return [layer.bi for layer in self.statistics]

    @cached_property
    def scores(self) -> UnitScores | None:
        """The sensitivity of every unit; None if the operator does not use units."""
        if not self.operator.uses_units:
            return None
        return unit_scores(self.stream, self.sensitivity, self.statistics, self.spans, self.layers)

    @cached_property
    def targets(self) -> ReconstructionTargets:
        """The reconstruction targets of the merged layer."""
        return ReconstructionTargets(
            self.stream,
            self.first,
            self.last,
            original=self.spans[-1][-1],
            place=self.place,
            target=self.refit.target_of(bool(self.narrower)),
            weighting=self.refit.weights,
        )

    def of_tokens(self, tokens: int | None) -> LayerSpan:
        """The span on the first windows with about this many tokens; None for all."""
        seq = self.stream.windows.shape[1]
        if tokens is None or tokens >= self.stream.tokens:
            return self
        return replace(self, stream=self.stream.head(max(1, tokens // seq)))

    def sources(self, split: UnitAllocation) -> SourceLayers:
        """The layers as the operator reads them, and the function that merges them."""
        sources = source_layers_of(
            self.stream.adapter, self.layers, self.operator, self.norms, split.shares, split.kept,
            self.slot,
        )  # fmt: skip
        return replace(sources, solved=split.solved)

    def trial(self, split: UnitAllocation) -> Route:
        """The layers that would replace the span; changed layers are copies outside the model."""
        adapter, block = self.stream.adapter, self.stream.block
        merged = self.sources(split).state
        if block == "layer":
            return [(self.place, adapter.copy_layer(self.place, merged))]
        kept_layer = split.shares.index(1.0) if self.operator.drops else None
        states = block_states(adapter, self.layers, kept_layer, merged, block)
        copies = {place: adapter.copy_layer(place, state) for place, state in states.items()}
        return [
            (index, copies.get(index, adapter.layers[index]))
            for index in range(self.first, self.last + 1)
        ]

    def losses(self, splits: Sequence[UnitAllocation]) -> list[float]:
        """Calibration loss, nats per predicted token, if each of `splits` merges the span.

        Only the merged layer and the layers after it run, from the boundary before the span.
        """
        found: list[float] = []
        for group in together(self.stream, splits):
            models = [Candidate(self.first, self.trial(split), self.last + 1) for split in group]
            found += losses(self.stream, models)
        return found
