"""CoMe's concatenation of the most sensitive units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from come.merge.operators.base import OPERATORS, KeptUnits, MergeOperator, weighted_sum
from come.models.adapter import LayerState, Part, Role


@OPERATORS.register
class Concat(MergeOperator):
    """Kept units of all layers side by side, shallow layer first, index order inside a layer.

    A unit brings its rows of q/k/v (gate/up) with their biases and its columns of o (down).
    Nothing is rescaled. Norms in front of the blocks: plain mean over the group (after folding,
    the mean of ones). Tensors that belong to no unit, output biases and per-head norms:
    rho-weighted sum.

    Source: arXiv 2510.15304. Differs from the paper's published code on grouped-query models:
    there the mask over KV heads is tiled instead of interleaved, which pairs query heads with
    foreign keys; here a KV group moves whole.
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
        merged: LayerState = {}
        for name, role in roles.items():
            tensors = [layer[name] for layer in layers]
            if role.part is Part.UNITS:
                assert role.unit is not None
                pieces = [
                    take_units(tensor, role, units)
                    for tensor, units in zip(tensors, kept[role.unit], strict=True)
                ]
                merged[name] = torch.cat(pieces, dim=role.axis)
            elif role.part is Part.NORM:
                merged[name] = weighted_sum(tensors, [1 / len(tensors)] * len(tensors))
            else:
                merged[name] = weighted_sum(tensors, shares)
        return merged


def take_units(
    tensor: Shaped[Tensor, "*shape"], role: Role, units: Sequence[int]
) -> Shaped[Tensor, "*kept"]:
    """The rows or columns of `tensor` that belong to `units`, in the order of `units`."""
    first = torch.as_tensor(units, dtype=torch.long, device=tensor.device) * role.size
    index = (first[:, None] + torch.arange(role.size, device=tensor.device)).flatten()
    return tensor.index_select(role.axis, index)
