"""No distillation."""

from __future__ import annotations

from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair


@DISTILL.register
class NoDistillation(Distillation):
    """Does not train; the merged model is unchanged."""

    name = "none"
    paper = ""
    source = "no training"
    active = False

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """Raises AssertionError, since there is no objective."""
        raise AssertionError("nothing to train")
