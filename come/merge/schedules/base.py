"""The interface of schedules, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from come.merge.combination import Combination
from come.merge.plan import Plan
from come.merge.search import Choice, Search
from come.registry import Registry
from come.setting import HasSettings


@dataclass(eq=False)
class Schedule(HasSettings, ABC):
    """Decides the order in which spans are chosen.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the procedure is described, in words.
        remeasures: whether the model is merged and measured again after every choice; if not, all
            choices are made on the dense model and applied together.
        plans_ahead: whether its first choice decides most later ones, so that layers are measured
            again only as far as the next span needs it.
        restarts: whether an interrupted search must start over.
        trials: whether it runs trial merges.
        nested: whether a smaller model continues from a larger one, so that one run reaches all
            depths; if not, each depth is searched from the dense model.
        uses_scores: whether it supports selections that try a shortlist of the lowest scores.
        single_span: whether one span contains all layers to remove, regardless of `merge.m`.
        variable_size: whether spans may have fewer than `merge.m` layers.
    """

    config_key = "merge.schedule"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    remeasures: ClassVar[bool] = True
    plans_ahead: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    trials: ClassVar[bool] = False
    nested: ClassVar[bool] = True
    uses_scores: ClassVar[bool] = True
    single_span: ClassVar[bool] = False
    variable_size: ClassVar[bool] = False

    @classmethod
    def check_depths(cls, num_layers: int, depths: Collection[int]) -> None:
        """Raises ValueError for depths that it cannot plan; needs no weights."""

    def check(self, method: Combination) -> None:
        """Raises ValueError if the schedule cannot be combined with the method's components."""
        if self.variable_size and method.operator.drops:
            raise ValueError(
                f"merge.schedule={self.name} weighs sizes of merged spans, and merge.operator="
                f"{method.operator.name} drops layers; choose merge.schedule=progressive"
            )

    def finished(self, plan: Plan, target: int) -> bool:
        """Whether no step follows."""
        return plan.num_layers <= target

    @abstractmethod
    def choose(self, search: Search) -> Choice:
        """The next span."""


SCHEDULES: Registry[Schedule] = Registry("schedule", "come.merge.schedules", "merge.schedule")
