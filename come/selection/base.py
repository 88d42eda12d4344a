"""What a score of a span of layers sees and gives; the registry of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from come.calibration.stream import LayerStream
from come.registry import Registry


class GroupScore(ABC):
    """Scores a span of adjacent layers; the span with the lowest score goes first.

    A merge scores the layers that become one, a drop the layers that are left out.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        local: whether a score depends on nothing behind the span, so that it holds as long as
            only layers behind it change.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    local: ClassVar[bool] = True

    def prepare(self, stream: LayerStream) -> None:  # noqa: B027 - most scores need nothing
        """Called before the spans of a new state of the model are scored."""

    @abstractmethod
    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Score of the layers first..last (inclusive, positions in the current model)."""


SELECTION: Registry[GroupScore] = Registry("selection score", "come.selection", "merge.selection")
