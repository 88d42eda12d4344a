"""What a distillation sees and gives; the registry of distillations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from come.models.adapter import ModelAdapter
from come.models.surgery import Span
from come.registry import Registry


@dataclass(frozen=True)
class Pair:
    """The merged model that learns and the dense model that it learns from.

    Attributes:
        student: the merged model; a distillation writes into it.
        teacher: the dense model, frozen.
        history: original layers behind every layer of the student.
    """

    student: ModelAdapter
    teacher: ModelAdapter
    history: Sequence[Span]

    @property
    def merged(self) -> list[int]:
        """Layers of the student that stand for several of the teacher's."""
        return [index for index, span in enumerate(self.history) if len(span) > 1]


class Objective(nn.Module, ABC):
    """What training minimises, as a module whose parameters with `requires_grad` are trained."""

    @abstractmethod
    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The loss on a batch of windows: "loss", mean over tokens, and its parts by name."""

    def validate(self, *batch: Tensor) -> dict[str, Tensor]:
        """What is told of held-out windows; "loss" chooses the best weights."""
        return self(*batch)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Distillation(ABC):
    """A way to heal a merged model.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the procedure stands, in words.
        active: whether it does anything.
        uses_teacher: whether training runs the dense model.
        apart: whether every merged layer is trained by itself, from the teacher's boundaries.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    active: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = True
    apart: ClassVar[bool] = False

    @abstractmethod
    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """What is minimised.

        Args:
            pair: student and teacher.
            layer: the merged layer, where each is trained apart.
        """

    def settle(self, objective: Objective, pair: Pair, layer: int | None = None) -> None:  # noqa: B027
        """Brings what was trained into the student as ordinary weights, where it is not yet."""


DISTILL: Registry[Distillation] = Registry(
    "distillation", "come.distill.objectives", "distill.method"
)
