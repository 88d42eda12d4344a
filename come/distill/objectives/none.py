"""No distillation."""

from __future__ import annotations

from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair


@DISTILL.register
class NoDistillation(Distillation):
    """Leaves the model as the merge made it."""

    name = "none"
    paper = ""
    source = "no training"
    active = False

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """There is none."""
        raise AssertionError("nothing to train")
