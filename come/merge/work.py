"""How much arithmetic and memory the parts of a merge need, for the estimate before it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Arithmetic, and the memory that it takes at its largest.

    Attributes:
        single: floating-point operations in the model's dtype or float32.
        double: floating-point operations in float64.
        bytes: memory beside weights and boundary states.
    """

    single: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.single + other.single, self.double + other.double, max(self.bytes, other.bytes)
        )

    def __mul__(self, times: float) -> Work:
        """The same again, `times` times."""
        return Work(self.single * times, self.double * times, self.bytes)


@dataclass(frozen=True)
class SpanSize:
    """The size of a span's least-squares problems.

    Attributes:
        layers: number of layers.
        tokens: calibration tokens.
        hidden: width of the residual stream.
        heads: width of one layer's head outputs.
        channels: FFN channels of one layer.
        parameters: parameters of one layer.
        input_maps: number of input projections of the FFN.
    """

    layers: int
    tokens: int
    hidden: int
    heads: int
    channels: int
    parameters: int
    input_maps: int = 2

    @property
    def passes(self) -> Work:
        """All tokens through one layer."""
        return Work(single=2.0 * self.tokens * self.parameters)

    @property
    def width(self) -> int:
        """FFN channels of all layers of the span."""
        return self.layers * self.channels

    def gram(self, width: int, out: int) -> Work:
        """The sums of a least-squares problem with `width` inputs and `out` outputs."""
        half = float(self.tokens) * width * width  # only one triangle is computed
        return Work(single=half + 2.0 * self.tokens * width * out, bytes=8.0 * width * width)

    def solve(self, width: int, out: int) -> Work:
        """A factorisation and a solution by it; two matrices at a time."""
        cubic = width**3 / 3 + 2.0 * width * width * out
        return Work(double=cubic, bytes=16.0 * width * width)

    def inverse(self, width: int) -> Work:
        """A factorisation and the inverse; the matrix, the factor, the inverse, and a copy."""
        return Work(double=float(width) ** 3, bytes=40.0 * width * width)

    def aligned(self) -> Work:
        """The alignment of both sublayers' input maps (see `come.merge.alignment`)."""
        out = self.hidden * self.layers
        once = self.gram(self.hidden, out) + self.solve(self.hidden, out)
        folded = Work(double=2.0 * self.parameters * self.layers * self.hidden)
        return once * 2 + folded + self.passes * (2 * self.layers)

    def eliminated(self, width: int, kept: int) -> Work:
        """Backward elimination from `width` to `kept` columns, on the inverse."""
        rounds = 2.0 * (float(width) ** 3 - float(kept) ** 3) / 3
        return self.inverse(width) + Work(double=rounds, bytes=44.0 * width * width)
