"""What a retention rule sees and gives; the registry of retention rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from come.calibration.statistics import LayerStatistics
from come.registry import Registry


class RetentionRule(ABC):
    """Decides how much of each layer of a group is kept.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def shares(self, group: Sequence[LayerStatistics]) -> list[float]:
        """Share rho_i of every layer of the group, in depth order; >= 0, summing to 1."""


RETENTION: Registry[RetentionRule] = Registry("retention rule", "come.retention", "merge.retention")
