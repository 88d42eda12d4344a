"""What a repair sees and gives; the registry of repairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from come.merge.combination import Combination
from come.merge.reconstruction import ReconstructionTargets, Target, Weighting
from come.merge.source_layers import SourceLayers
from come.models.adapter import LayerState
from come.registry import Registry
from come.setting import HasSettings, setting


@dataclass(eq=False)
class Refit(HasSettings, ABC):
    """Fits the layer that takes a group's place to what the group did.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula stands, in words.
        active: whether it does anything.
        batchwise: whether what it finds depends on how windows are batched.

    Attributes:
        target: whose hidden states are reconstructed, also by parts that choose units or spans by
            reconstruction.
        weights: of tokens, as in `token_weights`.
        downstream: penalty of the refit of all layers after the first merge; None for none.
        lambda_: penalty of the output maps, also of parts that choose units by the refit.
        align: penalty of the alignment of input maps; None for none.
    """

    config_key = "merge.refit"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    active: ClassVar[bool] = True
    batchwise: ClassVar[bool] = False
    target: Target = setting("dense", "whose states are reconstructed", choices=get_args(Target))
    weights: Weighting = setting("relative", "weights of tokens", choices=get_args(Weighting))
    downstream: float | None = setting(
        None,
        "penalty of a refit of all layers after the first merge; null for none",
        kind=float,
        above=0,
        optional=True,
    )
    lambda_: Any = field(init=False, repr=False, default=0.1)
    align: float | None = field(init=False, repr=False, default=None)

    def check(self, method: Combination) -> None:
        """Raises ValueError for parts of a method that the refit cannot work with."""
        readers = method.uses_targets
        if self.downstream is not None:
            readers = [*readers, "merge.refit.downstream"]
        if readers and method.block != "layer":
            raise ValueError(
                f"{readers[0]} reconstructs whole layers; merge.sublayers="
                f"{list(method.sublayers)} is not possible with it"
            )

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
