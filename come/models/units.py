"""A sublayer as data: its norm, input rows and output projection, and the units of these.

A sublayer adds `factor * post_norm(W f(norm(h)))` to the residual stream h. W is its output
projection, and its units are what can be kept or left out: KV groups, channels, or the sublayer as
a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from come.models.experts import Experts

Unit = str
"""A kind of units, such as "kv_group" or "channel"."""
SublayerKind = Literal["attention", "ffn"]
SUBLAYERS: tuple[SublayerKind, ...] = ("attention", "ffn")
"""What mixes tokens, and what acts on every token by itself."""
Block = Literal["layer", "attention", "ffn"]
"""What is merged or dropped: whole layers, or only their sublayers of one kind."""


@dataclass(frozen=True)
class Norm:
    """A norm module of a layer.

    Attributes:
        module: its name relative to the layer.
        offset: what is added to its weight; 1 where the scale is 1 + weight (Gemma).
    """

    module: str
    offset: float = 0.0


@dataclass(frozen=True)
class Rows:
    """The part of a sublayer's inputs that one module or tensor holds.

    Attributes:
        name: a module with a weight and possibly a bias, or a tensor, relative to the layer.
        sizes: rows of one unit, block by block. The first block holds sizes[0] adjacent rows of
            every unit, and so on: q, k and v of a fused projection are three blocks.
        axis: the dimension of the weight that the rows are; 1 if it is stored as [in, out].
        reads: whether it reads the output of the sublayer's norm.
        parts: number of equal parts, one after another, each with all blocks of its own units.
    """

    name: str
    sizes: tuple[int, ...] = (1,)
    axis: int = 0
    reads: bool = True
    parts: int = 1


@dataclass(frozen=True)
class Gate:
    """Input rows of which each hidden activation reads exactly one.

    Attributes:
        name: a module with a weight, relative to the layer.
        start: the row of the first activation.
        axis: the dimension of the weight that the rows are.
    """

    name: str
    start: int = 0
    axis: int = 0

    def slice(self, count: int) -> slice:
        """The positions of `count` rows."""
        return slice(self.start, self.start + count)

    def rows(self, weight: Tensor, count: int) -> Float[Tensor, "channels hidden"]:
        """The rows of `count` activations, a view of the weight."""
        return (weight if self.axis == 0 else weight.T)[self.slice(count)]

    def with_rows(self, weight: Tensor, rows: Float[Tensor, "channels hidden"]) -> Tensor:
        """The weight with other rows."""
        if rows.shape == weight.shape and self.axis == 0:
            return rows
        changed = weight.clone()
        self.rows(changed, len(rows)).copy_(rows)
        return changed


@dataclass(frozen=True)
class Sublayer:
    """One summand of the residual stream.

    Attributes:
        name: unique in its layer.
        kind: "attention" if it mixes tokens, "ffn" if it acts on every token by itself.
        unit: the kind of its units.
        count: how many units it has.
        norm: the norm whose output it reads; None if it reads the residual stream itself.
        inputs: the rows of its units.
        output: name of the module of its output projection; of its experts if it has them.
        columns: input columns of the output projection per unit, adjacent.
        output_axis: the dimension of the projection's weight that the columns are; 0 if it is
            stored as [in, out].
        post_norm: the norm of its output; None for none.
        factor: constant that multiplies its output.
        stage: sublayers of one stage read the same residual stream, side by side; the next stage
            reads it with their outputs added.
        shared: modules or tensors of the sublayer that belong to no unit.
        gates: input rows of which each hidden activation reads exactly one; empty if activations
            depend on several rows of a projection.
        silenced: modules that return zeros while the sublayer is left out, each with the number of
            values that it returns.
        opaque: whether its units are coupled, so that it is kept from one layer as a whole;
            `inputs` then are all of its modules. Its norm is one of them, unless other sublayers
            read it too.
        experts: its routed experts; `inputs` then are those of the router.
        output_gate: a module that reads the norm; the sigmoid of its output multiplies that of the
            sublayer, token by token. None for none.
        channel_gate: a module; the sigmoid of its output multiplies that of the sublayer, channel
            by channel. No single linear map leads from features to the output then, so the output
            projection is not refitted. None for none.
        joined: sublayers whose sum is this one's output, before the norm after it. Its columns are
            theirs side by side; it is opaque.
    """

    name: str
    kind: SublayerKind
    unit: Unit
    count: int
    norm: Norm | None
    inputs: tuple[Rows, ...]
    output: str
    columns: int = 1
    output_axis: int = 1
    post_norm: Norm | None = None
    factor: float = 1.0
    stage: int = 0
    shared: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    silenced: tuple[tuple[str, int], ...] = ()
    opaque: bool = False
    experts: Experts | None = None
    output_gate: str | None = None
    channel_gate: str | None = None
    joined: tuple[Sublayer, ...] = ()

    @property
    def parts(self) -> tuple[Sublayer, ...]:
        """The sublayers that it is the sum of; itself if it is no sum."""
        return self.joined or (self,)

    @property
    def width(self) -> int:
        """Input channels of the output projection."""
        return self.count * self.columns

    @property
    def weights(self) -> tuple[str, ...]:
        """The tensors of the output projection, without its bias."""
        if self.joined:
            return tuple(name for each in self.joined for name in each.weights)
        return self.experts.outputs if self.experts else (f"{self.output}.weight",)

    @property
    def bias(self) -> str:
        """The bias of the output projection, which may not exist."""
        return f"{self.output}.bias"

    def output_weight(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
        """The output projection; `tensors` has those of `weights`."""
        if self.joined:
            return torch.cat([each.output_weight(tensors) for each in self.joined], dim=1)
        if self.experts:
            return self.experts.matrix(tensors)
        weight = tensors[self.weights[0]]
        return weight if self.output_axis == 1 else weight.T

    def output_tensors(self, weight: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """The tensors of `weights` for an output projection."""
        if self.joined:
            columns = weight.split([each.width for each in self.joined], dim=1)
            pairs = zip(self.joined, columns, strict=True)
            return {k: v for each, own in pairs for k, v in each.output_tensors(own).items()}
        if self.experts:
            return self.experts.tensors(weight)
        return {self.weights[0]: weight if self.output_axis == 1 else weight.T}
