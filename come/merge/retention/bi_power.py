"""CoMe's retention rule: shares by a power of block influence."""

from __future__ import annotations

from dataclasses import dataclass

from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.span import LayerSpan
from come.setting import setting


@RETENTION.register
@dataclass(eq=False)
class BIPower(RetentionRule):
    """Shares proportional to a power of the layers' block influence.

        rho_i = BI_i^p / sum_{j in span} BI_j^p

    With p = 0 the shares are equal; with a large p the most influential layer gets everything. If
    all BI are zero, the shares are equal.

    Source: arXiv 2510.15304.
    """

    name = "bi_power"
    paper = "2510.15304"
    source = "CoMe, retention ratio"

    p: float = setting(1.0, "skewness exponent of the shares", least=0)

    def shares(self, span: LayerSpan) -> list[float]:
        """rho, one per layer, summing to 1."""
        influences = span.influences
        largest = max(influences)
        if largest == 0:
            return [1 / span.size] * span.size
        powers = [(bi / largest) ** self.p for bi in influences]  # no underflow at large p
        return [power / sum(powers) for power in powers]
