"""What a retention rule sees and gives; the registry of retention rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from come.merge.combination import Combination
from come.merge.span import Group, UnitAllocation
from come.merge.unit_scores import UnitScores
from come.merge.units import choose_units
from come.registry import Registry
from come.setting import HasSettings


@dataclass(eq=False)
class RetentionRule(HasSettings, ABC):
    """Decides how much of each layer of a group is kept, and which units.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        needs_units: whether it has no meaning for operators without units.
        trials: whether it runs trial merges.
        min_windows: calibration windows that it needs.
        uses_targets: whether it reads what the merged layer has to reproduce.
        uses_scores: whether it asks the sensitivity metric.
    """

    config_key = "merge.retention"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_units: ClassVar[bool] = False
    trials: ClassVar[bool] = False
    uses_targets: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    uses_scores: ClassVar[bool] = True

    def check(self, method: Combination) -> None:
        """Raises ValueError for parts of a method that the rule cannot work with."""
        if self.needs_units and not method.operator.uses_units:
            raise ValueError(
                f"merge.retention={self.name} ranks units, and merge.operator="
                f"{method.operator.name} does not use them; choose merge.operator=concat"
            )
        metric = method.sensitivity.name
        if metric != "come" and not (method.operator.uses_units and self.uses_scores):
            reason = f"merge.retention={self.name}"
            if not method.operator.uses_units:
                reason = f"merge.operator={method.operator.name}"
            raise ValueError(
                f"merge.sensitivity={metric} has no effect with {reason}, which does not use "
                "sensitivities; use merge=come, or merge.retention=bi_power merge.operator=concat"
            )

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
