"""What a score of a span of layers sees and gives; the registry of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from come.merge.refit.base import Refit
from come.merge.span import Group, UnitAllocation
from come.registry import Registry
from come.statistics.influence import TOKENS, chosen_tokens, token_cosine
from come.stream.stream import LayerStream


class GroupScore(ABC):
    """Scores a span of adjacent layers; the span with the lowest score goes first.

    A merge scores the layers that become one, a drop the layers that are left out.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        local: whether a score depends on nothing behind the span, so that it holds as long as
            only layers behind it change.
        min_windows: calibration windows that it needs.
        uses_goals: whether `refine` reads what the merged layer has to reproduce even without a
            refit.
        sampled_options: `merge.options` that `python run.py` adds where the calibration text is the
            model's own.

    Attributes:
        shortlist: how many of the spans with the lowest scores are tried for real and judged by
            `refine` instead; 0 for none.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    local: ClassVar[bool] = True
    uses_goals: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    sampled_options: ClassVar[Mapping[str, float]] = {}
    shortlist: int = 0

    def prepare(self, stream: LayerStream) -> None:  # noqa: B027 - most scores need nothing
        """Called before the spans of a new state of the model are scored."""

    @abstractmethod
    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Score of the layers first..last (inclusive, positions in the current model)."""

    def release(self) -> None:  # noqa: B027 - most scores hold nothing
        """Called behind a choice: frees what trials hold."""

    def trial_stream(self, stream: LayerStream) -> LayerStream:
        """The windows that trials are fitted to, all unless overridden."""
        return stream

    def refine(self, group: Group, split: UnitAllocation, refit: Refit) -> float:
        """What decides among the shortlist: the group, how it would be merged, and its repair."""
        raise NotImplementedError


def token_mean(
    stream: LayerStream,
    first: int,
    last: int,
    tokens: TOKENS,
    measure: Callable[[Float[Tensor, " tokens"]], Float[Tensor, " tokens"]],
) -> float:
    """Mean over tokens of a measure of cos(input, output) of the span of layers first..last."""
    total, count = 0.0, 0
    for before, after in stream.span(first, last):
        cosine = token_cosine(chosen_tokens(before, tokens), chosen_tokens(after, tokens))
        total += measure(cosine).sum().item()
        count += cosine.numel()
    return total / count


SELECTION: Registry[GroupScore] = Registry(
    "selection score", "come.merge.selection", "merge.selection"
)
