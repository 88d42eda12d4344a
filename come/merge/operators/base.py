"""The interface of merge operators, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from come.merge.combination import Combination
from come.merge.source_layers import KeptUnits
from come.models.layer_state import LayerState, LazyState
from come.models.layout import Role
from come.registry import Registry
from come.setting import HasSettings


@dataclass(eq=False)
class MergeOperator(HasSettings, ABC):
    """Merges the tensors of a span of layers into the tensors of one layer of the same shape.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula is defined, in words.
        uses_units: whether it reads `kept`; if not, no units are chosen.
        drops: whether it keeps one layer of the span and drops the others. The scored spans are
            then the dropped layers, and the kept layer is the one before them (the one after them
            if they start at the first layer).
    """

    config_key = "merge.operator"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    uses_units: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    def check(self, method: Combination) -> None:
        """Raises ValueError if the operator cannot be combined with the method's components."""

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
            layers: all tensors of every layer of the span, shallowest first.
            roles: role of each tensor.
            shares: rho of every layer, summing to 1; for a drop, 1 for the kept layer.
            kept: kept units of every layer, by kind; in total as many as one layer has.

        Returns:
            All tensors of the new layer, with the shapes and dtypes of the old ones.
        """

    def fixed_shares(self, size: int) -> list[float] | None:
        """Shares of `size` layers if the operator fixes them; None if retention decides."""
        return None


OPERATORS: Registry[MergeOperator] = Registry(
    "merge operator", "come.merge.operators", "merge.operator"
)


def summed(
    layers: Sequence[LayerState], names: Iterable[str], weights: Sequence[float]
) -> LayerState:
    """`weighted_sum` of the layers, tensor by tensor, each computed when it is read."""

    def make(name: str) -> Tensor:
        return weighted_sum([layer[name] for layer in layers], weights)

    return LazyState({name: partial(make, name) for name in names})


def weighted_sum(
    tensors: Sequence[Shaped[Tensor, "*shape"]], weights: Sequence[float]
) -> Shaped[Tensor, "*shape"]:
    """sum_i weights_i tensors_i, computed in float32 or wider, in the tensors' dtype."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(wide)
    return total.to(tensors[0].dtype)
