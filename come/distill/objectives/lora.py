"""LoRA training on the task loss, as a baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from come.distill.hidden_states import states_by_layer
from come.distill.losses import task_loss
from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair
from come.distill.trainable import add_lora, check_rank, equal_rank, merge_lora


class TaskLoss(Objective):
    """The student's cross-entropy on the text; the teacher is not used.

    Args:
        pair: student and teacher.
        recompute: whether to recompute layers in the backward pass, to save memory.
    """

    def __init__(self, pair: Pair, recompute: bool) -> None:
        super().__init__()
        self.student = pair.student.model
        self._adapter = pair.student
        self._recompute = recompute

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The loss on windows [batch, seq], nats per predicted token, as "loss" and "nll"."""
        (ids,) = batch
        adapter, last = self._adapter, self._adapter.num_layers - 1
        states = states_by_layer(adapter, ids, last, {last}, recompute=self._recompute)[last]
        loss = task_loss(adapter.head, adapter.final_norm(states), ids)
        return {"loss": loss, "nll": loss.detach()}


@DISTILL.register
class Lora(Distillation):
    """Trains low-rank adapters on all linear layers of all decoder layers with the task loss.

    The adapters are merged into the weights after training, so the result is an ordinary
    checkpoint.

    Source: arXiv 2106.09685, a common recovery step for pruned models.

    Args:
        lora_rank: rank of the adapters; "auto" for as many parameters as the merged layers have.
        gradient_checkpointing: whether to recompute layers in the backward pass, to save memory.
        seed: seed of the adapters.
    """

    name = "lora"
    paper = "2106.09685"
    source = "LoRA, task loss on all layers"
    uses_teacher = False

    def __init__(
        self, lora_rank: Any = "auto", gradient_checkpointing: bool = False, seed: int = 0
    ) -> None:
        self.rank = check_rank(lora_rank)
        self.recompute = gradient_checkpointing
        self.seed = seed

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """The task loss; adds adapters to the student."""
        layers = range(pair.student.num_layers)
        rank = equal_rank(pair.student, layers, len(pair.merged), self.rank)
        pair.student.model.requires_grad_(False)
        add_lora(pair.student, layers, rank, self.seed)
        return TaskLoss(pair, self.recompute)

    def write_back(self, pair: Pair) -> None:
        """Merges the adapters into the weights."""
        merge_lora(pair.student)
