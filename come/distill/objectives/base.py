"""The interface of distillation methods, and their registry."""

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
    """The student and the teacher of a distillation.

    Attributes:
        student: the merged model; the trained weights are written into it.
        teacher: the dense model, frozen.
        history: original layers that were merged into each layer of the student.
    """

    student: ModelAdapter
    teacher: ModelAdapter
    history: Sequence[Span]

    @property
    def merged(self) -> list[int]:
        """Indices of the student's layers that were merged from several layers."""
        return [index for index, span in enumerate(self.history) if len(span) > 1]


class Objective(nn.Module, ABC):
    """A training objective; its parameters with `requires_grad` are trained."""

    @abstractmethod
    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The losses on a batch: "loss", mean over tokens, which is minimised, and its terms."""

    def validate(self, *batch: Tensor) -> dict[str, Tensor]:
        """The losses on a batch of validation windows; "loss" selects the best weights."""
        return self(*batch)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def rates(self) -> dict[str, float]:
        """Factors of the learning rate of the trained parameters, by name."""
        return dict.fromkeys(self.trained, 1.0)


class StorableTeacher(Objective):
    """An objective that needs no teacher if its batches have the teacher's hidden states.

    Attributes:
        after: the teacher's layers whose output states are read, ascending; -1 for the embeddings.
    """

    after: list[int]

    @abstractmethod
    def release_teacher(self) -> None:
        """Frees its weights: the states after the layers `after` then follow each batch."""


class Distillation(ABC):
    """A method to train a merged model.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the procedure is described, in words.
        active: whether the method trains anything.
        uses_teacher: whether training runs the dense model.
        layerwise: whether every merged layer is trained separately, on the teacher's hidden states.
        can_store: whether its objective can read stored states of the teacher (`StorableTeacher`).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    source: ClassVar[str]
    active: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = True
    layerwise: ClassVar[bool] = False
    can_store: ClassVar[bool] = False

    @abstractmethod
    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """The objective to minimise.

        Args:
            pair: student and teacher.
            layer: the merged layer to train, if `layerwise`; None otherwise.
        """

    def write_back(self, pair: Pair) -> None:  # noqa: B027
        """Writes the trained parameters to the student, if they are not already its weights."""


DISTILL: Registry[Distillation] = Registry(
    "distillation", "come.distill.objectives", "distill.method"
)
