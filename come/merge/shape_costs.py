"""Parameters and times of models of other depths and FFN widths, as shares of the dense model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from come.models.width import CHANNEL

if TYPE_CHECKING:
    from come.models.shape import ModelShape


@dataclass(frozen=True)
class ParameterShare:
    """Parameters of a shape, divided by the dense model's; tied parameters count once.

        P(L, C) = P - sum(sizes of the N - L smallest layers) - L (F - C) p

    The removed layers may be larger than the smallest ones, so P(L, C) is an upper bound. It is
    exact where all layers have one size.

    Attributes:
        total: parameters of the dense model, P.
        sizes: parameters of each of its N layers.
        full: its FFN channels, F.
        per_channel: parameters of one FFN channel, p.
    """

    total: int
    sizes: tuple[int, ...]
    full: int
    per_channel: int

    @classmethod
    def of(cls, shape: ModelShape, full: int) -> ParameterShare:
        """The shares of a model's parameters."""
        return cls(shape.parameters, shape.layer_parameters, full, shape.unit_parameters[CHANNEL])

    def parameters(self, layers: int, channels: int) -> int:
        """The parameters of a shape."""
        removed = sum(sorted(self.sizes)[: len(self.sizes) - layers])
        return self.total - removed - layers * (self.full - channels) * self.per_channel

    def __call__(self, layers: int, channels: int) -> float:
        """The share of a shape."""
        return self.parameters(layers, channels) / self.total


@dataclass(frozen=True)
class LatencyShare:
    """Estimated time of a shape, divided by the dense model's: a sum of measured parts.

        T(L, C) = rest + L t(C),    share = T(L, C) / T(N, F)

    t(C) is linear between the measured widths. Both times are such sums: no whole model is timed.

    Attributes:
        rest: seconds of everything but the layers.
        times: seconds of one layer by its number of FFN channels, averaged over the dense model's
            layers.
        layers: layers of the dense model, N.
        full: its FFN channels, F; 0 if only the full width is known.
    """

    rest: float
    times: Mapping[int, float]
    layers: int
    full: int

    def seconds(self, layers: int, channels: int) -> float:
        """The time of a shape, in seconds."""
        widths = sorted(self.times)
        each = np.interp(channels, widths, [self.times[width] for width in widths])
        return self.rest + layers * float(each)

    def __call__(self, layers: int, channels: int) -> float:
        """The share of a shape."""
        return self.seconds(layers, channels) / self.seconds(self.layers, self.full)

    def __str__(self) -> str:
        parts = [
            f"{1e3 * time:.2f} ms a layer" + (f" with {width} FFN channels" if width else "")
            for width, time in sorted(self.times.items(), reverse=True)
        ]
        dense = self.seconds(self.layers, self.full)
        rest = f"{1e3 * self.rest:.2f} ms for the rest"
        return f"{', '.join(parts)}, {rest}; dense {1e3 * dense:.1f} ms"
