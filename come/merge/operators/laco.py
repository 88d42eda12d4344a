"""LaCo's merge, as in the paper's formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from come.merge.operators.base import OPERATORS, MergeOperator, summed
from come.merge.source_layers import KeptUnits
from come.models.layer_state import LayerState
from come.models.layout import Role


@OPERATORS.register
class LaCo(MergeOperator):
    """Adds each layer's difference from the first layer to the first layer, norms included.

        theta = theta_a + sum_{k = 1..m-1} (theta_{a+k} - theta_a)

    For two layers, the result is the second layer.

    Source: arXiv 2402.11187, reserving differences while seeking common.
    """

    name = "laco"
    paper = "2402.11187"
    source = "LaCo, RDSC layer merge"

    def fixed_shares(self, size: int) -> list[float] | None:
        """Equal shares; `merge` ignores them."""
        return [1 / size] * size

    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The merged layer; shares and units are ignored."""
        weights = [2.0 - len(layers), *[1.0] * (len(layers) - 1)]
        return summed(layers, roles, weights)
