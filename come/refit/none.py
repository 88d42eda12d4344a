"""No repair."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from come.calibration.goals import Goals
from come.models.adapter import LayerState
from come.refit.base import REFITS, Refit


@REFITS.register
class NoRefit(Refit):
    """Leaves the layer as the operator made it."""

    name = "none"
    paper = ""
    source = "no repair"
    active = False

    def solve(self, goals: Goals, state: Mapping[str, Tensor]) -> LayerState:
        """Nothing."""
        return {}
