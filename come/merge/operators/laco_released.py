"""LaCo's merge, as in the published code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from come.merge.operators.base import OPERATORS, MergeOperator
from come.merge.source_layers import KeptUnits
from come.models.layer_state import LayerState
from come.models.layout import Part, Role


@OPERATORS.register
class LaCoReleased(MergeOperator):
    """The last layer's weights with the first layer's norms.

    The published code adds each difference to weights that it has already changed, so the sum
    telescopes. It does not change the norms of the first layer.

    Source: the code of arXiv 2402.11187. Differs from the paper's formula: see `laco`.
    """

    name = "laco_released"
    paper = "2402.11187"
    source = "LaCo, behaviour of the published code"

    def fixed_shares(self, size: int) -> list[float] | None:
        """A share of 1 for the last layer; `merge` ignores it."""
        return [*[0.0] * (size - 1), 1.0]

    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The merged layer; shares and units are ignored."""
        return {
            name: layers[0 if role.part is Part.NORM else -1][name].clone()
            for name, role in roles.items()
        }
