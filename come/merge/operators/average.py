"""The weighted sum of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from come.merge.operators.base import OPERATORS, MergeOperator, summed
from come.merge.source_layers import KeptUnits
from come.models.layer_state import LayerState
from come.models.layout import Role


@OPERATORS.register
class Average(MergeOperator):
    """Every tensor is the share-weighted sum over the span, norms included.

        theta = sum_i rho_i theta_i

    Source: weighted layer averaging, the baseline of arXiv 2510.15304.
    """

    name = "average"
    paper = "2510.15304"
    source = "CoMe, the averaging baseline (WSLP)"

    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The averaged layer; `kept` is ignored."""
        return summed(layers, roles, shares)
