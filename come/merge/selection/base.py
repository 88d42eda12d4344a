"""What a score of a span of layers sees and gives; the registry of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from come.merge.combination import Combination
from come.merge.refit.base import Refit
from come.merge.span import Group, UnitAllocation
from come.registry import Registry
from come.setting import HasSettings
from come.statistics.influence import TOKENS, chosen_tokens, token_cosine
from come.stream.stream import LayerStream
from come.stream.token_blocks import TokenBlocks


@dataclass(eq=False)
class GroupScore(HasSettings, ABC):
    """Scores a span of adjacent layers; the span with the lowest score goes first.

    A merge scores the layers that become one, a drop the layers that are left out.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        local: whether a score depends on nothing behind the span, so that it holds as long as
            only layers behind it change.
        min_windows: calibration windows that it needs.
        uses_targets: whether `refine` reads what the merged layer has to reproduce even without a
            refit.

    Attributes:
        tokens: which tokens a mean over tokens reads, those of `merge.tokens`.
    """

    config_key = "merge.selection"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    local: ClassVar[bool] = True
    uses_targets: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    tokens: TOKENS = field(init=False, repr=False, default="last")

    @property
    def num_trials(self) -> int:
        """How many of the spans with the lowest scores are merged on trial; 0 for none.

        `refine` judges the trials, and its lowest value decides.
        """
        return 0

    def check(self, method: Combination) -> None:
        """Raises ValueError for parts of a method that the score cannot work with."""
        if self.num_trials and not (method.schedule.uses_scores or method.groups):
            raise ValueError(
                f"merge.selection={self.name} merges a shortlist on trial, and merge.schedule="
                f"{method.schedule.name} leaves it no choice: choose another selection, such as "
                "merge.selection=angular"
            )

    def prepare(self, stream: LayerStream) -> None:
        """Called before the spans of a new state of the model are scored."""

    @abstractmethod
    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Score of the layers first..last (inclusive, positions in the current model)."""

    def release(self) -> None:
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


SELECTION: Registry[GroupScore] = Registry(
    "selection score", "come.merge.selection", "merge.selection"
)
