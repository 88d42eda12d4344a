"""The interface of selection scores, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from come.merge.combination import Combination
from come.merge.refit.base import Refit
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.trial_layers import TrialLayers
from come.registry import Registry
from come.setting import HasSettings
from come.statistics.influence import TOKENS, chosen_tokens, token_cosine
from come.stream.stream import LayerStream
from come.stream.token_blocks import TokenBlocks


@dataclass(eq=False)
class SpanScore(HasSettings, ABC):
    """Scores a span of adjacent layers; the span with the lowest score is chosen first.

    For a merge, the span is the layers that become one; for a drop, the layers that are removed.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula is defined, in words.
        local: whether a score is independent of the layers after the span, so that it stays valid
            while only those change.
        min_windows: smallest number of calibration windows that it needs.
        uses_targets: whether `refine` reads the reconstruction targets even without a refit.
        scores_sets: whether `score_together` scores several trial merges at once.

    Attributes:
        tokens: which tokens a mean over tokens includes, from `merge.tokens`.
        layers: where trial merges keep their layers; None to keep none.
    """

    config_key = "merge.selection"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    local: ClassVar[bool] = True
    uses_targets: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    scores_sets: ClassVar[bool] = False
    tokens: TOKENS = field(init=False, repr=False, default="last")
    layers: TrialLayers | None = field(init=False, repr=False, default=None)

    @property
    def num_trials(self) -> int:
        """How many of the spans with the lowest scores get a trial merge; 0 for none.

        The span with the lowest value of `refine` is then chosen.
        """
        return 0

    def trial_tokens(self, windows: int, seq_len: int) -> tuple[int, int]:
        """Number of tokens that a trial merge is fitted to, and that it is evaluated on."""
        return windows * seq_len, 0

    def check(self, method: Combination) -> None:
        """Raises ValueError if the score cannot be combined with the method's components."""
        if self.num_trials and not (method.schedule.uses_scores or method.groups):
            raise ValueError(
                f"merge.selection={self.name} merges a shortlist on trial, and merge.schedule="
                f"{method.schedule.name} leaves it no choice: choose another selection, such as "
                "merge.selection=angular"
            )

    def prepare(self, stream: LayerStream) -> None:
        """Called before spans are scored, and again whenever the model has changed."""

    @abstractmethod
    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Score of the layers first..last (inclusive, positions in the stream's model)."""

    def scores(self, stream: LayerStream, spans: Sequence[tuple[int, int]]) -> list[float]:
        """Scores of several spans; may need fewer passes than scoring each by itself."""
        return [self.score(stream, first, last) for first, last in spans]

    def release(self) -> None:
        """Called after a choice; frees the memory and the files that trial merges hold."""
        if self.layers is not None:
            self.layers.clear()

    def trial_stream(self, stream: LayerStream) -> LayerStream:
        """The windows that trial merges are fitted to; by default all windows."""
        return stream

    def refine(self, span: LayerSpan, split: UnitAllocation, refit: Refit) -> float:
        """Score of a trial merge by `split`, fitted by `refit`; the lowest is chosen."""
        raise NotImplementedError

    def refine_all(
        self, trials: Iterable[tuple[LayerSpan, UnitAllocation]], refit: Refit
    ) -> list[float]:
        """Scores of several trial merges; may need fewer passes than scoring each by itself."""
        return [self.refine(span, split, refit) for span, split in trials]

    def score_together(
        self, stream: LayerStream, spans: Sequence[tuple[int, int]], layers: TrialLayers
    ) -> float:
        """Score of the model in which all spans, ascending, are replaced by their trial layers."""
        raise NotImplementedError


def token_mean(
    stream: LayerStream,
    first: int,
    last: int,
    tokens: TOKENS,
    measure: Callable[[Float[Tensor, " tokens"]], Float[Tensor, " tokens"]],
) -> float:
    """Mean over tokens of `measure` of cos(input, output), for the span of layers first..last."""
    total, count = 0.0, 0

    def accumulate(values: Tensor) -> None:
        nonlocal total
        total += values.sum().item()

    blocks = TokenBlocks(accumulate)
    for before, after in stream.span(first, last):
        cosine = token_cosine(chosen_tokens(before, tokens), chosen_tokens(after, tokens))
        blocks.add(measure(cosine))
        count += cosine.numel()
    blocks.finish()
    return total / count


SELECTION: Registry[SpanScore] = Registry(
    "selection score", "come.merge.selection", "merge.selection"
)
