"""The sublayers that a plan leaves out of their layers, and how many parameters they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from come.models.adapter import ModelAdapter
from come.models.layout import SublayerKind


@dataclass(frozen=True)
class DroppedSublayer:
    """A sublayer whose output is zero.

    Attributes:
        layer: the layer that it is in.
        kind: "attention" or "ffn".
        parameters: its parameters, its norm included.
        cost: what its choice was based on, >= 0.
    """

    layer: int
    kind: SublayerKind
    parameters: int
    cost: float


@dataclass(frozen=True)
class SublayerDrops:
    """All sublayers that a plan drops, attention and FFN apart.

    Their layers stay, so that the model is an ordinary checkpoint: the output projections of the
    dropped sublayers are zero. Such blocks save neither bytes nor, in ordinary runtimes, time.

    Attributes:
        depth: the number of whole layers that costs as much: with it, at most as many parameters
            are removed as here.
        sublayers: the dropped ones, from the first layer on.
    """

    depth: int
    sublayers: Sequence[DroppedSublayer]

    @property
    def parameters(self) -> int:
        """The parameters of all dropped sublayers, which are stored but not used."""
        return sum(dropped.parameters for dropped in self.sublayers)

    @property
    def decisions(self) -> list[Any]:
        """What determines the weights, as plain data."""
        return [self.depth, [[dropped.layer, dropped.kind] for dropped in self.sublayers]]

    def described(self) -> str:
        """The layers by kind of sublayer: "attention of layers 1, 5, FFN of layers 3"."""
        names: dict[SublayerKind, str] = {"attention": "attention", "ffn": "FFN"}
        layers = {
            name: [str(dropped.layer) for dropped in self.sublayers if dropped.kind == kind]
            for kind, name in names.items()
        }
        return ", ".join(
            f"{name} of layers {', '.join(own)}" for name, own in layers.items() if own
        )

    @classmethod
    def read(cls, data: Mapping[str, Any] | None) -> SublayerDrops | None:
        """The drops of a plan's JSON, which may have none."""
        if data is None:
            return None
        return cls(data["depth"], [DroppedSublayer(**each) for each in data["sublayers"]])


def zero_dropped(adapter: ModelAdapter, drops: SublayerDrops, index: int) -> bool:
    """Zeroes the output projections of the dropped sublayers of layer `index`, if it has any."""
    own = [dropped for dropped in drops.sublayers if dropped.layer == index]
    for dropped in own:
        adapter.write(index, adapter.zeroed(index, dropped.kind))
    return bool(own)
