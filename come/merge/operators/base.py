"""The interface of merge operators, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from come.merge.combination import Combination
from come.merge.span import Group, UnitAllocation
from come.models.adapter import LayerState, Role, Unit
from come.registry import Registry
from come.setting import HasSettings

KeptUnits = Mapping[Unit, Sequence[Sequence[int]]]
"""For each kind of unit, the kept indices of every layer of the span, ascending."""


@dataclass(frozen=True)
class Solution:
    """What an operator solves on calibration data, in addition to the merged weights.

    Attributes:
        tensors: tensors of the merged layer that replace those of `merge`.
        output_scale: factor on the output projections (and their biases) of all layers after it.
    """

    tensors: LayerState = field(default_factory=dict)
    output_scale: float = 1.0


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
        solves: whether it overrides `solve`.
    """

    config_key = "merge.operator"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    uses_units: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    solves: ClassVar[bool] = False

    def check(self, method: Combination) -> None:
        """Raises ValueError if the operator cannot be combined with the method's components."""
        if not self.solves:
            return
        key = f"merge.operator={self.name}"
        if method.block != "layer":
            raise ValueError(
                f"{key} solves for whole layers; merge.sublayers={list(method.sublayers)} is not "
                "possible with it"
            )
        if method.uses_targets or method.refit.downstream is not None:
            reader = next(iter(method.uses_targets), "merge.refit.downstream")
            raise ValueError(
                f"{key} solves for the layer itself; {reader} is not possible with it: choose "
                "merge.operator=drop or concat"
            )
        if method.schedule.trials or method.selection.num_trials:
            trying = f"merge.selection={method.selection.name}"
            if method.schedule.trials:
                trying = f"merge.schedule={method.schedule.name}"
            raise ValueError(
                f"{trying} merges on trial without what {key} solves for: choose another, such as "
                "merge.schedule=block merge.selection=angular"
            )

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

    def solve(self, group: Group, split: UnitAllocation) -> Solution:
        """Solves for tensors on calibration data, after `merge`; by default for none."""
        return Solution()


OPERATORS: Registry[MergeOperator] = Registry(
    "merge operator", "come.merge.operators", "merge.operator"
)


def weighted_sum(
    tensors: Sequence[Shaped[Tensor, "*shape"]], weights: Sequence[float]
) -> Shaped[Tensor, "*shape"]:
    """sum_i weights_i tensors_i, computed in float32 or wider, in the tensors' dtype."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(wide)
    return total.to(tensors[0].dtype)
