"""What a retention rule sees and gives; the registry of retention rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from come.merge.span import Group, UnitAllocation
from come.merge.unit_scores import UnitScores
from come.merge.units import choose_units
from come.registry import Registry


class RetentionRule(ABC):
    """Decides how much of each layer of a group is kept, and which units.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        needs_units: whether it has no meaning for operators without units.
        trials: whether it runs trial merges.
        min_windows: calibration windows that it needs.
        uses_goals: whether it reads what the merged layer has to reproduce.
        uses_scores: whether it asks the sensitivity metric.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    needs_units: ClassVar[bool] = False
    trials: ClassVar[bool] = False
    uses_goals: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    uses_scores: ClassVar[bool] = True

    @abstractmethod
    def shares(self, group: Group) -> list[float]:
        """Share rho_i of every layer of the group, in depth order; >= 0, summing to 1."""

    def split(self, group: Group) -> UnitAllocation:
        """The shares, and inside each layer the most sensitive units, as many as its share.

        A rule that ranks the units of several layers together overrides this.
        """
        return with_units(self.shares(group), group.scores() if group.scores else None)


def with_units(shares: Sequence[float], scores: UnitScores | None) -> UnitAllocation:
    """The split by shares with the most sensitive units of each layer; none without scores."""
    return UnitAllocation(list(shares), choose_units(scores, shares) if scores else {})


RETENTION: Registry[RetentionRule] = Registry(
    "retention rule", "come.merge.retention", "merge.retention"
)
