"""No refit."""

from __future__ import annotations

from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState


@REFITS.register
class NoRefit(Refit):
    """Keeps the merged layer unchanged."""

    name = "none"
    paper = ""
    source = "no repair"
    active = False

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """No tensors."""
        return {}
