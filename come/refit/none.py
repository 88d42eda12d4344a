"""No repair."""

from __future__ import annotations

from come.calibration.goals import Goals
from come.calibration.group import Pieces
from come.models.adapter import LayerState
from come.refit.base import REFITS, Refit


@REFITS.register
class NoRefit(Refit):
    """Leaves the layer as the operator made it."""

    name = "none"
    paper = ""
    source = "no repair"
    active = False

    def solve(self, goals: Goals, pieces: Pieces) -> LayerState:
        """Nothing."""
        return {}
