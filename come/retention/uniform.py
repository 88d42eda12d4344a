"""Equal shares: the control of every comparison of retention rules."""

from __future__ import annotations

from collections.abc import Sequence

from come.calibration.statistics import LayerStatistics
from come.retention.base import RETENTION, RetentionRule


@RETENTION.register
class Uniform(RetentionRule):
    """Every layer of the group keeps the same share: rho_i = 1/m."""

    name = "uniform"
    paper = ""
    source = "control"

    def shares(self, group: Sequence[LayerStatistics]) -> list[float]:
        """1/m for every layer."""
        return [1 / len(group)] * len(group)
