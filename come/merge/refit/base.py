"""What a repair sees and gives; the registry of repairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from come.merge.reconstruction import ReconstructionTargets
from come.merge.span import SourceLayers
from come.models.adapter import LayerState
from come.registry import Registry


class Refit(ABC):
    """Fits the layer that takes a group's place to what the group did.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        active: whether it does anything.
        batchwise: whether what it finds depends on how windows are batched.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    active: ClassVar[bool] = True
    batchwise: ClassVar[bool] = False

    @abstractmethod
    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """The tensors that change.

        Args:
            goals: the layer's inputs and what is wanted behind its blocks.
            pieces: what the operator made the layer of; `pieces.state` is all of its tensors.

        Returns:
            Tensors that take the place of those in `pieces.state`, same shapes and dtypes.
        """

    @property
    def surrogate(self) -> Refit:
        """A cheaper one for trial merges, which have to tell groups apart and no more."""
        return self


REFITS: Registry[Refit] = Registry("refit", "come.merge.refit", "merge.refit")
