"""How a merge treats every tensor of a layer, from the layer's description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from come.models.experts import Experts
from come.models.units import Norm, Sublayer, Unit


class Part(Enum):
    """How a merge treats a tensor of a layer."""

    UNITS = "units"  # split along one axis into units; each unit is kept or dropped as a whole
    NORM = "norm"  # scale or bias of a norm before a sublayer
    SHARED = "shared"  # belongs to no unit: output biases, per-head norms, norms after a sublayer


@dataclass(frozen=True)
class Role:
    """How a merge treats one tensor of a layer.

    Attributes:
        part: how a merge treats it.
        sublayer: name of the sublayer that it belongs to; empty for the scale of a layer.
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


def roles_of(sublayers: Iterable[Sublayer], names: Iterable[str]) -> dict[str, Role]:
    """The role of every tensor of a layer.

    Raises:
        ValueError: a tensor is not described.
    """
    found: dict[str, Role] = {}
    for sublayer in sublayers:
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
        if name.endswith(".bias") and role.part is Part.UNITS and role.sizes:
            role = replace(role, axis=0, input_axis=-1)
        roles[name] = role
    return roles


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
