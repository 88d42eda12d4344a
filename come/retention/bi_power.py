"""CoMe's retention rule: shares by a power of block influence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from come.calibration.statistics import LayerStatistics
from come.retention.base import RETENTION, RetentionRule


@RETENTION.register
class BIPower(RetentionRule):
    """Shares proportional to a power of the layers' block influence.

        rho_i = BI_i^p / sum_{j in group} BI_j^p

    p = 0 shares equally; a large p leaves all to the most influential layer. Where all BI are
    zero the shares are equal.

    Source: arXiv 2510.15304.

    Args:
        p: the skewness exponent, >= 0.
    """

    name = "bi_power"
    paper = "2510.15304"
    source = "CoMe, retention ratio"

    def __init__(self, p: float = 1.0) -> None:
        if not (math.isfinite(p) and p >= 0):
            raise ValueError(f"merge.p={p}: the skewness exponent must be a finite number >= 0")
        self.p = p

    def shares(self, group: Sequence[LayerStatistics]) -> list[float]:
        """rho, one a layer, summing to 1."""
        largest = max(layer.bi for layer in group)
        if largest == 0:
            return [1 / len(group)] * len(group)
        powers = [(layer.bi / largest) ** self.p for layer in group]  # no underflow at large p
        return [power / sum(powers) for power in powers]
