"""CoMe's concatenation of the most sensitive units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from come.merge.operators.base import OPERATORS, MergeOperator, weighted_sum
from come.merge.source_layers import KeptUnits
from come.models.layer_state import LayerState, LazyState
from come.models.layout import Part, Role


@OPERATORS.register
class Concat(MergeOperator):
    """Concatenates the kept units of all layers, shallowest layer first, in index order per layer.

    A unit is its rows of the input projections with their biases (q/k/v_proj, gate/up_proj) and its
    columns of the output projection (o_proj, down_proj). Nothing is rescaled. Norms before a
    sublayer are averaged over the span (after folding, the mean of ones). Tensors that belong to no
    unit, such as output biases and per-head norms, are rho-weighted sums.

    Source: arXiv 2510.15304. Differs from the paper's published code for grouped-query attention:
    that code tiles the mask over KV heads instead of interleaving it, which pairs query heads with
    keys of other groups; here a KV group is kept or dropped as a whole.
    """

    name = "concat"
    paper = "2510.15304"
    source = "CoMe, channel concatenation"
    uses_units = True

    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The concatenated layer."""
        return LazyState(
            {
                name: partial(
                    _merged,
                    [partial(layer.__getitem__, name) for layer in layers],
                    role,
                    shares,
                    kept,
                )
                for name, role in roles.items()
            }
        )


def _merged(
    read: Sequence[Callable[[], Tensor]], role: Role, shares: Sequence[float], kept: KeptUnits
) -> Tensor:
    """One tensor of the concatenated layer; units are taken from one layer at a time."""
    if role.part is Part.UNITS:
        assert role.unit is not None
        return _concatenated(read, role, kept[role.unit])
    tensors = [tensor() for tensor in read]
    equal = [1 / len(tensors)] * len(tensors)
    return weighted_sum(tensors, equal if role.part is Part.NORM else shares)


def _concatenated(
    read: Sequence[Callable[[], Tensor]], role: Role, units: Sequence[Sequence[int]]
) -> Tensor:
    """The kept units of one tensor of all layers, block by block."""
    if not role.sizes:  # one unit has all: the tensor of the layer that keeps it
        return next(tensor() for tensor, own in zip(read, units, strict=True) if own)
    layers = [take_units(tensor(), role, own) for tensor, own in zip(read, units, strict=True)]
    blocks = torch.cat([part for block in zip(*layers, strict=True) for part in block], role.axis)
    if role.parts == 1:
        return blocks
    count = role.count(blocks)
    order = torch.cat(role.indices(count, range(count))).to(blocks.device)
    return torch.empty_like(blocks).index_copy_(role.axis, order, blocks)


def take_units(
    tensor: Shaped[Tensor, "*shape"], role: Role, units: Sequence[int]
) -> list[Shaped[Tensor, "*kept"]]:
    """The rows or columns of `tensor` that belong to `units`, in their order, block by block."""
    indices = role.indices(role.count(tensor), units)
    return [tensor.index_select(role.axis, index.to(tensor.device)) for index in indices]
