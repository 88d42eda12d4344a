"""A decoder layer as data: its sublayers, their norms, and the units that their tensors consist of.

A sublayer adds `factor * post_norm(W f(norm(h)))` to the residual stream h. W is its output
projection, and its units are what can be kept or left out: KV groups, channels, or the sublayer as
a whole. Algorithms know a model only through these descriptions; each family makes them from its
configuration (`come.models.families`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.models.experts import Experts

Unit = str
"""A kind of units, such as "kv_group" or "channel"."""
SublayerKind = Literal["attention", "ffn"]
SUBLAYERS: tuple[SublayerKind, ...] = ("attention", "ffn")
"""What mixes tokens, and what acts on every token by itself."""
Block = Literal["layer", "attention", "ffn"]
"""What is merged or dropped: whole layers, or only their sublayers of one kind."""


class Part(Enum):
    """How a merge treats a tensor of a layer."""

    UNITS = "units"  # split along one axis into units; each unit is kept or dropped as a whole
    NORM = "norm"  # scale or bias of a norm before a sublayer
    SHARED = "shared"  # belongs to no unit: output biases, per-head norms, norms after a sublayer


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
        step: distance between the rows of adjacent activations.
        axis: the dimension of the weight that the rows are.
    """

    name: str
    start: int = 0
    step: int = 1
    axis: int = 0

    def slice(self, count: int) -> slice:
        """The positions of `count` rows."""
        return slice(self.start, self.start + self.step * count, self.step)

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


@dataclass(frozen=True)
class Role:
    """How a merge treats one tensor of a layer.

    Attributes:
        part: how a merge treats it.
        sublayer: name of the sublayer that it belongs to.
        unit: kind of the units (`Part.UNITS` only).
        axis: the dimension that is split into units.
        sizes: rows or columns of one unit, block by block; empty if one unit has all.
        norm: the norm whose output the tensor reads.
        input_axis: the dimension of the norm's channels, if it reads a norm.
        parts: number of equal parts along the axis, each with all blocks of its own units.
    """

    part: Part
    sublayer: str
    unit: Unit | None = None
    axis: int = 0
    sizes: tuple[int, ...] = (1,)
    norm: Norm | None = None
    input_axis: int = -1
    parts: int = 1

    def indices(self, count: int, units: Sequence[int]) -> list[Int[Tensor, " _"]]:
        """Positions along the axis of some of `count` units, for every block."""
        assert count % self.parts == 0
        found, start, each = [], 0, count // self.parts
        chosen = torch.as_tensor(units, dtype=torch.long)
        for size in self.sizes:
            first = start + chosen // each * each * sum(self.sizes) + chosen % each * size
            found.append((first[:, None] + torch.arange(size)).flatten())
            start += each * size
        return found

    def count(self, tensor: Tensor) -> int:
        """Number of units that the tensor has."""
        return tensor.shape[self.axis] // sum(self.sizes)


@dataclass(frozen=True)
class LayerLayout:
    """The sublayers of one decoder layer, in the order of the forward pass.

    Attributes:
        sublayers: the sublayers; those of one stage are adjacent.
        kind: what distinguishes the layer from others with the same tensors, such as
            "sliding_attention".
    """

    sublayers: tuple[Sublayer, ...]
    kind: str = ""

    def __iter__(self) -> Iterator[Sublayer]:
        return iter(self.sublayers)

    def sublayer(self, name: str) -> Sublayer:
        """The sublayer with this name."""
        return next(sublayer for sublayer in self.sublayers if sublayer.name == name)

    @property
    def last(self) -> Sublayer:
        """The last sublayer."""
        return self.sublayers[-1]

    @property
    def routed(self) -> bool:
        """Whether features of a unit depend on which other units there are, as those of experts."""
        return any(part.experts for sublayer in self.sublayers for part in sublayer.parts)

    @property
    def unit_counts(self) -> dict[Unit, int]:
        """Number of units by kind."""
        return {sublayer.unit: sublayer.count for sublayer in self.sublayers}

    def of(self, block: Block) -> list[Sublayer]:
        """The sublayers that belong to a block."""
        return [sublayer for sublayer in self.sublayers if block in ("layer", sublayer.kind)]

    def before(self, sublayer: Sublayer) -> list[Sublayer]:
        """The sublayers that run before this one."""
        return list(self.sublayers[: self.sublayers.index(sublayer)])

    def after(self, sublayer: Sublayer) -> list[Sublayer]:
        """The sublayers that run after this one."""
        return list(self.sublayers[self.sublayers.index(sublayer) + 1 :])

    def read_after(self, sublayer: Sublayer) -> Sublayer | None:
        """The sublayer after which this one reads the residual stream; None for the layer's input.

        For sublayers side by side, it is the last one of the stage before.
        """
        earlier = [other for other in self.before(sublayer) if other.stage < sublayer.stage]
        return earlier[-1] if earlier else None

    def roles(self, names: Iterable[str]) -> dict[str, Role]:
        """The role of every tensor of the layer.

        Raises:
            ValueError: a tensor is not described.
        """
        found: dict[str, Role] = {}
        for sublayer in self.sublayers:
            found = _roles(sublayer) | found
        roles: dict[str, Role] = {}
        for name in names:
            module, _, kind = name.rpartition(".")
            own = found.get(module) if kind in ("weight", "bias") else None
            role = found.get(name) or own or _owner(found, name)
            if role is None:
                raise ValueError(
                    f"layer tensor {name!r} is not known, so this model cannot be merged safely"
                )
            is_bias = name.endswith(".bias") and role.part is Part.UNITS and bool(role.sizes)
            roles[name] = _of_bias(role) if is_bias else role
        return roles


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of a causal language model are, and what its layers consist of.

    Attributes:
        layers: the layout of every decoder layer.
        stack: name of the list of decoder layers, relative to the model.
        final_norm: name of the norm between the last layer and the LM head.
        returns: number of values that a layer returns; 0 for a tensor instead of a tuple.
        before_head: the module between the final norm and the LM head; empty for none.
        logit_scale: multiplies the logits.
        logit_cap: c of c tanh(logits / c); 0 for none.
        begin_token: whether the family predicts well only after its begin token.
        float32_states: whether the residual stream is float32 even if weights are narrower.
    """

    layers: tuple[LayerLayout, ...]
    stack: str = "model.layers"
    final_norm: str = "model.norm"
    returns: int = 0
    before_head: str = ""
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    begin_token: bool = False
    float32_states: bool = False

    @property
    def decoder(self) -> str:
        """The module that embeds tokens and loops over the layers."""
        return self.stack.rpartition(".")[0]


def _roles(sublayer: Sublayer) -> dict[str, Role]:
    """The roles of a sublayer's modules and tensors by name."""
    found: dict[str, Role]
    name, unit, norm = sublayer.name, sublayer.unit, sublayer.norm
    if sublayer.opaque:
        names = {rows.name for rows in sublayer.inputs}
        common = norm if norm and norm.module not in names else None
        own = Role(Part.UNITS, name, unit, sizes=())
        reader = replace(own, norm=common)
        found = {rows.name: reader if rows.reads else own for rows in sublayer.inputs}
        if common:
            found[common.module] = Role(Part.NORM, name)
        if sublayer.post_norm:
            found[sublayer.post_norm.module] = Role(Part.SHARED, name)
        return found
    found = {}
    for rows in sublayer.inputs:
        read = norm if rows.reads else None
        found[rows.name] = Role(
            *(Part.UNITS, name, unit, rows.axis, rows.sizes, read, 0 if rows.axis == 1 else -1),
            parts=rows.parts,
        )
    if sublayer.experts:
        found |= _expert_roles(sublayer, sublayer.experts)
    else:
        output = Role(Part.UNITS, name, unit, sublayer.output_axis, (sublayer.columns,))
        found |= {sublayer.weights[0]: output, sublayer.bias: Role(Part.SHARED, name)}
    if sublayer.output_gate:
        found[sublayer.output_gate] = Role(Part.SHARED, name, norm=norm)
    found |= {module: Role(Part.SHARED, name) for module in sublayer.shared}
    if sublayer.post_norm:
        found[sublayer.post_norm.module] = Role(Part.SHARED, name)
    if norm:
        found[norm.module] = Role(Part.NORM, name)
    return found


def _expert_roles(sublayer: Sublayer, experts: Experts) -> dict[str, Role]:
    """The roles of the tensors of experts; a unit consists of one or more adjacent experts."""
    each = experts.count // sublayer.count
    axis = 1 if experts.transposed else -1
    rows = experts.channels if experts.stacked else 1
    role = partial(Role, Part.UNITS, sublayer.name, sublayer.unit, 0)
    found = {name: role((each * rows,), sublayer.norm, axis) for name in experts.inputs}
    found |= {name: role((each,), sublayer.norm) for name in experts.input_biases}
    found |= {experts.output: role((each * rows,))}
    return found | {name: role((each,)) for name in experts.outputs[1:]}


def _owner(found: dict[str, Role], name: str) -> Role | None:
    """The role of the innermost described module that contains a tensor, if that is kept whole."""
    module = name
    while module := module.rpartition(".")[0]:
        if module in found:
            role = found[module]
            return role if role.part is not Part.UNITS or not role.sizes else None
    return None


def _of_bias(role: Role) -> Role:
    """The role of the bias beside a weight."""
    return replace(role, axis=0, input_axis=-1)
