"""The interface of schedules, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from come.merge.combination import Combination
from come.merge.constraints import SpanConstraints
from come.merge.plan import MergeStep, SpanCandidate
from come.merge.span import LayerSpan, UnitAllocation
from come.models.surgery import Span
from come.progress import ProgressBar
from come.registry import Registry
from come.setting import HasSettings
from come.stream.stream import LayerStream


@dataclass(frozen=True)
class Choice:
    """The next span to merge, layers first..last of the current model, and its scores.

    Attributes:
        first: first layer of the span.
        last: last layer of the span, inclusive.
        kept: index in the span of the layer that a drop keeps; None for a merge.
        score: score of the chosen span.
        candidates: all spans scored for this choice; with a shortlist, only the spans tried.
    """

    first: int
    last: int
    kept: int | None
    score: float
    candidates: list[SpanCandidate]


@dataclass(frozen=True)
class Search:
    """State of the search for the next span.

    Attributes:
        stream: the layer stream, of the current model if the schedule remeasures, otherwise of the
            dense model.
        history: original layers merged into each layer of the current model.
        steps: the merges so far; empty if their candidates were scored with another method.
        origins: position in the stream's model of every layer of the current model.
        stops: the remaining depths that must not be skipped, the target last.
        rules: which spans are allowed.
        score: returns the score of layers first..last of the stream's model; cached while it
            cannot have changed.
        group: returns the span of layers first..last of the current model, for a trial merge.
        split: returns the allocation of a span, given the index of the layer that a drop keeps.
        refine: returns the score of a trial merge, which decides among the shortlist.
        shortlist: number of spans with the lowest scores that are tried; 0 for no trials.
    """

    stream: LayerStream
    history: Sequence[Span]
    steps: Sequence[MergeStep]
    origins: Sequence[int]
    stops: Sequence[int]
    rules: SpanConstraints
    score: Callable[[int, int], float]
    group: Callable[[int, int], LayerSpan]
    split: Callable[[LayerSpan, int | None], UnitAllocation]
    refine: Callable[[int, int], float]
    shortlist: int = 0

    @property
    def target(self) -> int:
        """The depth to reach."""
        return self.stops[-1]

    def lowest(self, spans: Sequence[tuple[int, int]]) -> Choice:
        """The span with the lowest score, or of a shortlist the one with the lowest trial score."""
        candidates = self.scored(spans)
        if self.shortlist and len(candidates) > 1:
            best = sorted(candidates, key=lambda candidate: candidate.score)[: self.shortlist]
            candidates = self.refined([(c.first, c.last) for c in best])
        return self.choose(candidates)

    def scored(self, spans: Sequence[tuple[int, int]]) -> list[SpanCandidate]:
        """The spans with their scores."""
        own = self.origins
        return [SpanCandidate(a, b, self.score(own[a], own[b])) for a, b in spans]

    def refined(self, spans: Sequence[tuple[int, int]]) -> list[SpanCandidate]:
        """The spans with the scores of their trial merges."""
        trials = ProgressBar(spans, desc="trial merges", shown=self.stream.progress)
        return [SpanCandidate(a, b, self.refine(a, b)) for a, b in trials]

    def choose(self, candidates: list[SpanCandidate]) -> Choice:
        """The candidate with the lowest score; ties go to the first one."""
        best = min(candidates, key=lambda candidate: candidate.score)
        first, last, kept = self.rules.group(best.first, best.last)
        return Choice(first, last, kept, best.score, candidates)


@dataclass(eq=False)
class Schedule(HasSettings, ABC):
    """Decides the order in which spans are chosen.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the procedure is described, in words.
        remeasures: whether the model is merged and measured again after every choice; if not, all
            choices are made on the dense model and applied together.
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
                f"merge.schedule={self.name} weighs sizes of merged groups, and merge.operator="
                f"{method.operator.name} drops layers; choose merge.schedule=progressive"
            )

    @abstractmethod
    def choose(self, search: Search) -> Choice:
        """The next span."""


SCHEDULES: Registry[Schedule] = Registry("schedule", "come.merge.schedules", "merge.schedule")
