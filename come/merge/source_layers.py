"""The layers of a span as the operator reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from come.linalg.equations import Map
from come.models.layer_state import LayerState
from come.models.layout import Unit

KeptUnits = Mapping[Unit, Sequence[Sequence[int]]]
"""For each kind of unit, the kept indices of every layer of the span, ascending."""


@dataclass(frozen=True)
class UnitSolution:
    """The solution of the least-squares problem that unit selection solved for a sublayer.

    Attributes:
        inputs: for every layer of the span the map P_i that multiplies its input projections
            (see `come.merge.alignment`); empty without alignment.
        output: output projection of the kept units.
    """

    inputs: Sequence[Tensor]
    output: Map


@dataclass(frozen=True)
class SourceLayers:
    """The layers of a span as the operator reads them, and the function that merges them.

    Attributes:
        layers: all tensors of every layer, shallowest first.
        join: returns all tensors of the merged layer, given the source layers' tensors.
        shares: share of every layer in the merged layer.
        kept: kept units of every layer, by kind; empty if no units are chosen.
        solved: solutions for the kept units, by kind, if unit selection has computed them.
    """

    layers: Sequence[LayerState]
    join: Callable[[Sequence[LayerState]], LayerState]
    shares: Sequence[float] = ()
    kept: KeptUnits = field(default_factory=dict)
    solved: Mapping[Unit, UnitSolution] = field(default_factory=dict)

    @property
    def kept_layer(self) -> int:
        """Index of the layer that a drop keeps."""
        return kept_layer(self.shares)

    @property
    def state(self) -> LayerState:
        """All tensors of the merged layer."""
        return self.join(self.layers)


def kept_layer(shares: Sequence[float]) -> int:
    """Index of the layer that a drop keeps."""
    return max(range(len(shares)), key=lambda i: shares[i])
