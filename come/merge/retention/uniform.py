"""Equal shares, a control for the other retention rules."""

from __future__ import annotations

from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan


@RETENTION.register
class Uniform(RetentionRule):
    """Every layer of the span keeps the same share: rho_i = 1/m."""

    name = "uniform"
    paper = ""
    source = "control"

    def shares(self, span: LayerSpan) -> list[float]:
        """1/m for every layer."""
        return [1 / span.size] * span.size
