"""A group of layers about to become one: what is known of it, and how to try a way to split it."""

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
    """How much of each layer of a group is kept, and which units.

    Attributes:
        shares: rho of every layer, in depth order; >= 0, summing to 1.
        kept: kept units of every layer, ascending, by kind; empty where no units are chosen.
    """

    shares: list[float]
    kept: dict[Unit, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Layers first..last of the current model, between boundaries first and last + 1.

    Attributes:
        stream: all boundaries of the model as it is.
        first: first layer of the group.
        last: last layer of the group, inclusive.
        spans: original layers behind every layer of the group.
        statistics: of every layer of the group.
        pieces: gives what the operator reads, and how it merges by a split.
        trial: gives the layers that take the group's place for a split, to be passed in turn.
        refit: how the merged layer will be fitted.
        scores: gives the sensitivity of every unit; None where the operator has no units.
        goals: gives what a layer in its place has to reproduce.
    """

    stream: LayerStream
    first: int
    last: int
    spans: Sequence[Span]
    statistics: Sequence[LayerStatistics]
    pieces: Callable[[UnitAllocation], SourceLayers]
    trial: Callable[[UnitAllocation], Route]
    refit: Refit
    scores: Callable[[], UnitScores] | None = None
    goals: Callable[[], ReconstructionTargets] | None = None

    @property
    def size(self) -> int:
        """Layers of the group."""
        return len(self.statistics)

    @property
    def influences(self) -> list[float]:
        """Block influence of every layer."""
        return [layer.bi for layer in self.statistics]

    def merge(self, split: UnitAllocation) -> LayerState:
        """The tensors of the merged layer."""
        return self.pieces(split).state

    def loss(self, split: UnitAllocation) -> float:
        """Calibration loss, nats a predicted token, if the group were merged by `split`.

        Only what lies behind the group is computed, from the boundary in front of it.
        """
        return self.stream.loss(self.first, self.full_route(split))

    def full_route(self, split: UnitAllocation) -> Route:
        """All layers from the boundary in front of the group to the end, if merged by `split`."""
        behind = self.stream.route(self.last + 1, self.stream.num_layers - 1)
        return [*self.trial(split), *behind]
