"""What a group score sees and gives; the registry of group scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from come.calibration.stream import LayerStream
from come.registry import Registry


class GroupScore(ABC):
    """Scores a group of adjacent layers; the group with the lowest score is merged.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Score of the group of layers first..last (inclusive, positions in the current model)."""


SELECTION: Registry[GroupScore] = Registry("selection score", "come.selection", "merge.selection")
