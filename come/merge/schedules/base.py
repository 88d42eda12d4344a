"""The interface of schedules, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from come.merge.combination import Combination
from come.merge.dropped import SublayerDrops
from come.merge.plan import Plan, SpanCandidate
from come.merge.search import Choice, Search
from come.models.layout import LayerLayout
from come.registry import Registry
from come.setting import HasSettings
from come.stream.stream import LayerStream


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
        reads_selection: whether it reads `merge.selection`.
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
    reads_selection: ClassVar[bool] = True

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

    def passes(self, num_layers: int, target: int) -> tuple[int, int]:
        """Passes of all calibration tokens for its own losses, at most; for the estimate.

        Returns:
            Passes through one layer, and passes through the LM head.
        """
        return 0, 0

    def finished(self, plan: Plan, target: int) -> bool:
        """Whether no step follows."""
        return plan.num_layers <= target

    @property
    def sets_compared(self) -> int:
        """How many sets of spans are scored with the layers of all their trial merges, or 0."""
        return 0

    @property
    def surrogate(self) -> Schedule:
        """A cheaper schedule for trials of a whole compression, which only have to rank shapes."""
        return self

    @abstractmethod
    def choose(self, search: Search) -> Choice:
        """The next span."""


@dataclass(eq=False)
class SetSchedule(Schedule):
    """Chooses the whole set of layers to drop on the dense model, then drops them one by one."""

    remeasures = False
    restarts = True
    uses_scores = False
    _chosen: list[tuple[int, float]] = field(init=False, repr=False, default_factory=list)

    def check(self, method: Combination) -> None:
        """Raises ValueError unless the method drops single layers."""
        super().check(method)
        reason = None
        if not method.operator.drops:
            reason = f"drops layers, and merge.operator={method.operator.name} merges them; choose "
            reason += "merge.operator=drop"
        elif method.m != 2:
            reason = f"drops single layers; merge.m={method.m} is not possible with it"
        elif method.block != "layer":
            reason = (
                f"drops whole layers; merge.sublayers={list(method.sublayers)} is not possible "
                "with it; choose merge.schedule=progressive"
            )
        if reason:
            raise ValueError(f"merge.schedule={self.name} {reason}")

    @abstractmethod
    def removed(self, search: Search, count: int) -> list[tuple[int, float]]:
        """The `count` layers to drop, in this order, each with the score to record."""

    def choose(self, search: Search) -> Choice:
        """The next layer of the set.

        Raises:
            ValueError: without it, no layer of a kind that the model needs would be left.
        """
        if not self._chosen:
            self._chosen = self.removed(search, len(search.history) - search.target)
        layer, score = self._chosen[len(search.plan.steps)]
        place = search.origins.index(layer)
        search.rules.allowed_drops([[place]], len(search.history))
        candidate = SpanCandidate(place, place, score)
        return Choice(*search.rules.removal(place, place), score, [candidate])


class SublayerSchedule(Schedule):
    """Chooses single sublayers to drop, attention and FFN apart, on the dense model.

    The layers stay, and no span is merged (see `come.merge.sublayer_drops`).
    """

    remeasures = False
    restarts = True
    nested = False
    uses_scores = False
    reads_selection = False

    @abstractmethod
    def check_layers(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises ValueError for layers whose sublayers cannot be dropped one by one."""

    @abstractmethod
    def dropped(self, stream: LayerStream, method: Combination, target: int) -> SublayerDrops:
        """The sublayers to drop, with at least the parameters of the layers beyond `target`.

        Args:
            stream: the dense model, with all boundaries.
            method: the merging method.
            target: the depth whose cost is reached.
        """

    def choose(self, search: Search) -> Choice:
        """No span is ever chosen."""
        raise NotImplementedError(f"{self.name} drops sublayers, see `dropped`")


SCHEDULES: Registry[Schedule] = Registry("schedule", "come.merge.schedules", "merge.schedule")
