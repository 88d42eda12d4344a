"""No repair."""

from __future__ import annotations

from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.source_layers import SourceLayers
from come.models.adapter import LayerState


@REFITS.register
class NoRefit(Refit):
    """Leaves the layer as the operator made it."""

    name = "none"
    paper = ""
    source = "no repair"
    active = False

    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """Nothing."""
        return {}
