"""Layer dropping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from come.merge.operators.base import OPERATORS, MergeOperator
from come.merge.source_layers import KeptUnits, kept_layer
from come.models.layer_state import LayerState
from come.models.layout import Role


@OPERATORS.register
class Drop(MergeOperator):
    """Keeps one layer of the span unchanged and drops the others.

    The selection score and the schedule decide which layers are dropped: ShortGPT, UIDL, SLEB and
    the baselines of Shortened LLaMA are recipes with this operator.

    Source: arXiv 2403.03853 (ShortGPT), 2403.17887 (UIDL), 2402.09025 (SLEB), 2402.02834.
    """

    name = "drop"
    paper = "2403.03853"
    source = "layer removal"
    drops = True

    def merge(
        self,
        layers: Sequence[LayerState],
        roles: Mapping[str, Role],
        shares: Sequence[float],
        kept: KeptUnits,
    ) -> LayerState:
        """The layer whose share is 1."""
        return dict(layers[kept_layer(shares)])
