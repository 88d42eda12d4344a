"""Arithmetic and memory of the steps of a merge, for the estimate before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from come.linalg.equations import DUAL, choice_dtype, outputs_read


@dataclass(frozen=True)
class Work:
    """Arithmetic, and its peak memory.

    Attributes:
        forward: floating-point operations of forward passes, in the model's dtype.
        single: floating-point operations in float32.
        double: floating-point operations in float64.
        bytes: peak memory in addition to weights and boundary states.
    """

    forward: float = 0.0
    single: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """This work, then the other."""
        return Work(
            self.forward + other.forward,
            self.single + other.single,
            self.double + other.double,
            max(self.bytes, other.bytes),
        )

    def __mul__(self, times: int | float) -> Work:
        """This work, `times` times in sequence."""
        return Work(self.forward * times, self.single * times, self.double * times, self.bytes)


@dataclass(frozen=True)
class SpanSize:
    """The size of a span's least-squares problems.

    Attributes:
        layers: number of layers.
        tokens: calibration tokens.
        hidden: width of the residual stream.
        heads: width of one layer's head outputs.
        channels: MLP channels of one layer.
        parameters: parameters of one layer.
        input_maps: number of input projections of the MLP.
        ratio: penalty of the refit, relative to the mean diagonal of its Gram matrix.
        kept: MLP channels of the new layer; None for as many as a layer has.
    """

    layers: int
    tokens: int
    hidden: int
    heads: int
    channels: int
    parameters: int
    input_maps: int = 2
    ratio: float = 0.1
    kept: int | None = None

    @property
    def passes(self) -> Work:
        """One forward pass of all tokens through one layer."""
        return Work(forward=2.0 * self.tokens * self.parameters)

    @property
    def width(self) -> int:
        """MLP channels of all layers of the span."""
        return self.layers * self.channels

    @property
    def itemsize(self) -> int:
        """Bytes per entry of the normal equations for channel selection."""
        return choice_dtype(self.width, self.ratio).itemsize

    @property
    def layer_bytes(self) -> float:
        """Bytes of a copy of one layer in float32."""
        return 4.0 * self.parameters

    def dual(self, width: int, columns_per_token: int = 1) -> bool:
        """Whether a problem with `width` inputs is solved in its dual form."""
        return width >= columns_per_token * self.tokens

    def sums(self, width: int, out: int, columns_per_token: int = 1, itemsize: int = 8) -> Work:
        """Accumulating a least-squares problem with `width` inputs and `out` outputs.

        `itemsize`: bytes per entry of the normal equations, 8 for float64, 4 for float32.
        """
        tokens = float(self.tokens)
        if self.dual(width, columns_per_token):
            stored = 4 * tokens * (width + out) + 8 * tokens * tokens
            return Work(single=tokens * tokens * width, bytes=stored)
        half = tokens * width * width  # only one triangle is computed
        stored = float(itemsize) * width * (width + out)
        return Work(single=half + 2 * tokens * width * out, bytes=stored)

    def solve(self, width: int, out: int) -> Work:
        """An in-place factorisation, and solving with it."""
        order, single = width, 0.0
        if self.dual(width):
            order, single = self.tokens, 4.0 * self.tokens * width * out
        cubic = order**3 / 3 + 2.0 * order * order * out
        return Work(
            single=single, double=cubic, bytes=self.sums(width, out).bytes + 8.0 * width * out
        )

    def inverse(self, width: int, itemsize: int = 8) -> Work:
        """An in-place factorisation and inverse; in the dual form, a triangular solve."""
        if self.dual(width, DUAL):
            tokens = float(self.tokens)
            return Work(
                single=tokens * tokens * width, double=tokens**3 / 3, bytes=16 * tokens * tokens
            )
        return _of(float(width) ** 3, itemsize) + Work(bytes=float(itemsize) * width * width)

    def aligned(self) -> Work:
        """The input alignment of both sublayers (see `come.merge.alignment`)."""
        width, out = float(self.hidden), float(self.hidden * self.layers)
        once = Work(
            single=self.tokens * width * (width + 2 * out),  # always by normal equations
            double=width**3 / 3 + 2 * width * width * out,
            bytes=8 * width * (3 * width + 1.5 * out),
        )
        return once * 2 + self.passes * self.layers

    def folded(self) -> Work:
        """Folding the alignment into the input projections of one layer."""
        return Work(single=2.0 * self.parameters * self.hidden, bytes=2 * self.layer_bytes)

    def eliminated(self, width: int, kept: int) -> Work:
        """Backward elimination from `width` to `kept` columns."""
        item, removed = self.itemsize, float(width) ** 2 - float(kept) ** 2
        if self.dual(width, DUAL):
            tokens, read = float(self.tokens), float(outputs_read(self.hidden))
            start = self.inverse(width) + Work(
                single=2 * tokens * width * (tokens + 2 * read), double=2 * tokens**2 * read
            )
            stored = 4 * tokens * width + 4 * read * width
            stored += max(24 * tokens**2, 4.0 * width * self.hidden)  # the initial map, once
            return start + Work(single=(tokens + read) * removed, bytes=stored)
        rounds = 2.0 * (float(width) ** 3 - float(kept) ** 3) / 3
        rounds += 2.0 * (width - kept) * width * self.hidden
        stored = item * (2.0 * width * width + 3.0 * width * self.hidden)
        return self.inverse(width, item) + _of(rounds, item) + Work(bytes=stored)


def _of(operations: float, itemsize: int) -> Work:
    """Operations on numbers of `itemsize` bytes."""
    return Work(double=operations) if itemsize == 8 else Work(single=operations)
