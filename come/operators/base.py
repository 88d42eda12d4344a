"""What a merge operator sees and gives; the registry of operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from come.models.adapter import LayerState, Role, Unit
from come.registry import Registry

KeptUnits = Mapping[Unit, Sequence[Sequence[int]]]
"""For each kind of unit the kept indices of every layer of the group, ascending."""


class MergeOperator(ABC):
    """Turns the tensors of a group of layers into the tensors of one layer of the same shape.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        uses_units: whether it reads `kept`; if not, no units are chosen.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    uses_units: ClassVar[bool] = True

    @abstractmethod
    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The merged layer.

        Args:
            layers: all tensors of every layer of the group, shallow first.
            roles: what each tensor is made of.
            shares: rho of every layer, summing to 1.
            kept: kept units of every layer, by kind; together as many as one layer has.

        Returns:
            All tensors of the new layer, of the shapes and dtypes of the old ones.
        """


OPERATORS: Registry[MergeOperator] = Registry("merge operator", "come.operators", "merge.operator")


def weighted_sum(
    tensors: Sequence[Shaped[Tensor, "*shape"]], weights: Sequence[float]
) -> Shaped[Tensor, "*shape"]:
    """sum_i weights_i tensors_i, computed in float32 or wider, in the tensors' dtype."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(wide)
    return total.to(tensors[0].dtype)
