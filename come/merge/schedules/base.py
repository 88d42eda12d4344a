"""What a schedule sees and gives; the registry of schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tqdm import tqdm

from come.merge.combination import Combination
from come.merge.constraints import SpanConstraints
from come.merge.plan import GroupCandidate, MergeStep
from come.merge.span import Group, UnitAllocation
from come.models.surgery import Span
from come.registry import Registry
from come.setting import HasSettings
from come.stream.stream import LayerStream


@dataclass(frozen=True)
class Choice:
    """The next group: layers first..last of the current model, and what decided.

    Attributes:
        first: first layer of the group.
        last: last layer of the group, inclusive.
        kept: the layer that a drop keeps, 0 for the first of the group; None for a merge.
        score: score of the chosen span.
        candidates: all spans that were scored for it; of a shortlist those that were tried.
    """

    first: int
    last: int
    kept: int | None
    score: float
    candidates: list[GroupCandidate]


@dataclass(frozen=True)
class Search:
    """The state of a search for the next group.

    Attributes:
        stream: the layer stream, on the current model if the schedule remeasures, else on the dense
            one.
        history: original layers behind every layer of the current model.
        steps: the merges so far, where their candidates were scored as those of this search are.
        origins: position in the stream's model of every layer of the current one.
        stops: the depths ahead that must not be jumped over, the target last.
        rules: which groups are allowed.
        score: score of a span of the stream's model; one that cannot have changed is not computed
            again.
        group: the group of layers first..last of the stream's model, to try a merge.
        split: how much of each layer of a group is kept; with the layer that a drop keeps.
        refine: what decides among the `shortlist` spans with the lowest scores.
        shortlist: how many spans `refine` is asked about; 0 leaves the choice to the score.
    """

    stream: LayerStream
    history: Sequence[Span]
    steps: Sequence[MergeStep]
    origins: Sequence[int]
    stops: Sequence[int]
    rules: SpanConstraints
    score: Callable[[int, int], float]
    group: Callable[[int, int], Group]
    split: Callable[[Group, int | None], UnitAllocation]
    refine: Callable[[int, int], float]
    shortlist: int = 0

    @property
    def target(self) -> int:
        """The depth to reach."""
        return self.stops[-1]

    def lowest(self, spans: Sequence[tuple[int, int]]) -> Choice:
        """The span with the lowest score, the first of equal ones, as a choice."""
        candidates = self.scored(spans)
        if self.shortlist and len(candidates) > 1:
            best = sorted(candidates, key=lambda candidate: candidate.score)[: self.shortlist]
            candidates = self.refined([(c.first, c.last) for c in best])
        return self.choose(candidates)

    def scored(self, spans: Sequence[tuple[int, int]]) -> list[GroupCandidate]:
        """The spans with their scores."""
        own = self.origins
        return [GroupCandidate(a, b, self.score(own[a], own[b])) for a, b in spans]

    def refined(self, spans: Sequence[tuple[int, int]]) -> list[GroupCandidate]:
        """The spans with what trial merges say."""
        trials = tqdm(spans, desc="trial merges", leave=False, delay=2, disable=self.stream.quiet)
        return [GroupCandidate(a, b, self.refine(a, b)) for a, b in trials]

    def choose(self, candidates: list[GroupCandidate]) -> Choice:
        """The candidate with the lowest score, the first of equal ones."""
        best = min(candidates, key=lambda candidate: candidate.score)
        first, last, kept = self.rules.group(best.first, best.last)
        return Choice(first, last, kept, best.score, candidates)


@dataclass(eq=False)
class Schedule(HasSettings, ABC):
    """Decides in which order groups are chosen.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the procedure stands, in words.
        remeasures: whether the model is merged and measured again after every choice; if not, all
            choices are made on the dense model and applied together.
        restarts: whether an interrupted search has to start again.
        trials: whether it runs trial merges.
        nested: whether a deeper result goes on from a shallower one, so that one run passes
            through all depths; if not, every depth is found from the dense model.
        uses_scores: whether the spans' scores decide; if not, a shortlist of them has no meaning.
        single_span: whether one group takes all layers that have to go, whatever `merge.m` is.
        variable_size: whether groups may be smaller than `merge.m`.
    """

    config_key = "merge.schedule"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    remeasures: ClassVar[bool] = True
    restarts: ClassVar[bool] = False
    trials: ClassVar[bool] = False
    nested: ClassVar[bool] = True
    uses_scores: ClassVar[bool] = True
    single_span: ClassVar[bool] = False
    variable_size: ClassVar[bool] = False

    @classmethod
    def check_depths(cls, num_layers: int, depths: Collection[int]) -> None:
        """Raises ValueError for depths that it cannot plan; called before anything is loaded."""

    def check(self, method: Combination) -> None:
        """Raises ValueError for parts of a method that the schedule cannot work with."""
        if self.variable_size and method.operator.drops:
            raise ValueError(
                f"merge.schedule={self.name} weighs sizes of merged groups, and merge.operator="
                f"{method.operator.name} drops layers; choose merge.schedule=progressive"
            )

    @abstractmethod
    def choose(self, search: Search) -> Choice:
        """The next group."""


SCHEDULES: Registry[Schedule] = Registry("schedule", "come.merge.schedules", "merge.schedule")
