"""A span of layers to merge: its statistics, and how to build and evaluate a trial merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import Refit
from come.merge.source_layers import SourceLayers
from come.merge.unit_scores import UnitScores
from come.models.adapter import LayerState, Unit
from come.models.surgery import Span
from come.statistics.layer_statistics import LayerStatistics
from come.stream.stream import LayerStream, Route


@dataclass(frozen=True)
class UnitAllocation:
    """How much of each layer of a span is kept, and which units.

    Attributes:
        shares: share rho of every layer, in depth order; >= 0, summing to 1.
        kept: kept units of every layer, ascending, by kind; empty if no units are chosen.
    """

    shares: list[float]
    kept: dict[Unit, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSpan:
    """Layers first..last of the stream's model, between boundaries first and last + 1.

    Attributes:
        stream: hidden states at all boundaries of the current model.
        first: first layer of the span.
        last: last layer of the span, inclusive.
        spans: original layers merged into each layer of the span.
        statistics: calibration statistics of each layer of the span.
        sources: returns the source layers and their merge function for an allocation.
        trial: returns the route that replaces the span under an allocation.
        refit: the refit of the merged layer.
        scores: returns the sensitivity of every unit; None if the operator does not use units.
        targets: returns the reconstruction targets of the span.
    """

    stream: LayerStream
    first: int
    last: int
    spans: Sequence[Span]
    statistics: Sequence[LayerStatistics]
    sources: Callable[[UnitAllocation], SourceLayers]
    trial: Callable[[UnitAllocation], Route]
    refit: Refit
    scores: Callable[[], UnitScores] | None = None
    targets: Callable[[], ReconstructionTargets] | None = None

    @property
    def size(self) -> int:
        """Number of layers in the span."""
        return len(self.statistics)

    @property
    def influences(self) -> list[float]:
        """Block influence of every layer."""
        return [layer.bi for layer in self.statistics]

    def merge(self, split: UnitAllocation) -> LayerState:
        """The tensors of the merged layer, without a refit."""
        return self.sources(split).state

    def loss(self, split: UnitAllocation) -> float:
        """Calibration loss, nats per predicted token, if `split` merges the span.

        Only the merged layer and the layers after it run, from the boundary before the span.
        """
        return self.stream.loss(self.first, self.full_route(split))

    def full_route(self, split: UnitAllocation) -> Route:
        """All layers from the boundary before the span to the end, if `split` merges the span."""
        downstream = self.stream.route(self.last + 1, self.stream.num_layers - 1)
        return [*self.trial(split), *downstream]
