"""CoMe-sp: trains all merged layers of the student jointly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from come.distill.hidden_states import states_after
from come.distill.losses import Loss, check_temperature, hidden_loss, logit_kl, task_loss
from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair
from come.distill.trainable import check_rank, check_train, choose_parameters, merge_lora


class MatchedStates(Objective):
    """Sum over the merged layers k of the loss between the student's h_k and the teacher's h_b.

    Student and teacher run one forward pass each. If the layers before the first merged layer
    equal the teacher's, they run only once, in the teacher. The layers after the last merged layer
    run only for the logit loss, and in the student for validation.

    Args:
        pair: student and teacher.
        loss: loss between hidden states; None for no such loss.
        logit_weight: weight of the KL between logits; 0 for none.
        temperature: temperature of that KL.
        recompute: whether to recompute the student's layers in the backward pass, to save memory.
    """

    def __init__(
        self,
        pair: Pair,
        loss: Loss | None,
        logit_weight: float = 0.0,
        temperature: float = 1.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.student = pair.student.model
        self._pair = pair
        self._loss, self._logit_weight, self._temperature = loss, logit_weight, temperature
        self._recompute = recompute
        self._first = pair.merged[0] if _layers_before_merge_equal(pair) else 0

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The losses on windows [batch, seq]: "loss", "layer_K" per merged layer K, "logits"."""
        (ids,) = batch
        return self._losses(ids, whole=self._logit_weight > 0)[0]

    def validate(self, *batch: Tensor) -> dict[str, Tensor]:
        """The same losses, and "nll": the student's cross-entropy, nats per predicted token."""
        (ids,) = batch
        losses, states = self._losses(ids, whole=True)
        student = self._pair.student
        losses["nll"] = task_loss(student.head, student.final_norm(states), ids)
        return losses

    def _losses(self, ids: Tensor, whole: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and the student's states after the last layer that was run."""
        pair, history = self._pair, self._pair.history
        student, teacher, merged = pair.student, pair.teacher, pair.merged
        depth = len(history) if whole else merged[-1] + 1
        logits = whole and self._logit_weight > 0
        ends = {history[k][-1] for k in merged} if self._loss else set()
        start_layer = history[self._first][0]  # the teacher's layer at which the student starts
        last = teacher.num_layers - 1 if logits else max(ends, default=start_layer - 1)
        with torch.no_grad():
            dense = states_after(teacher, ids, last, {*ends, start_layer - 1, last})
            start = dense[start_layer - 1].to(student.model.dtype) if self._first else None
        found = states_after(
            student,
            ids,
            depth - 1,
            {*merged, depth - 1},
            first=self._first,
            states=start,
            recompute=self._recompute,
        )
        states = found[depth - 1]
        losses: dict[str, Tensor] = {}
        if self._loss is not None:
            for k in merged:
                losses[f"layer_{k}"] = self._loss(found[k], dense[history[k][-1]])
        total = torch.stack(list(losses.values())).sum() if losses else states.new_zeros(())
        if logits:
            losses["logits"] = logit_kl(
                student.head,
                student.final_norm(states),
                teacher.head,
                teacher.final_norm(dense[last]),
                self._temperature,
            )
            total = total + self._logit_weight * losses["logits"]
        return {"loss": total, **losses}, states


def _layers_before_merge_equal(pair: Pair) -> bool:
    """Whether embeddings and layers before the first merged layer equal the teacher's.

    They are compared in the teacher's dtype, because a half-precision student trains in float32.
    """
    own, other = pair.student, pair.teacher
    modules = [(own.model.get_input_embeddings(), other.model.get_input_embeddings())]
    modules += [(own.layers[k], other.layers[k]) for k in range(pair.merged[0])]
    return all(
        torch.equal(a.to(b.dtype), b)
        for one, two in modules
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


@DISTILL.register
class ComeSP(Distillation):
    """Trains all merged layers jointly in one forward pass of the student; the rest is frozen.

        L = sum_k L_k( h_k of the student, h_b of the teacher )  [+ logit_weight * KL of the logits]

    for every merged layer k that replaces the teacher's layers a..b.

    Source: arXiv 2510.15304, CoMe-sp. Differs from the paper in the default loss, because with the
    paper's KL the loss falls while perplexity rises (experiments/distill). Optimiser, schedule and
    text are our choice.

    Args:
        loss: mse, kl (the paper's), cosine or mix.
        loss_weights: weights of the terms of "mix".
        temperature: T of the KLs.
        logit_weight: weight of the KL between logits.
        train: parameters of the merged layers to train: layers (all), norms, outputs or lora.
        lora_rank: rank of the adapters; "auto" for as many parameters as the merged layers have.
        gradient_checkpointing: whether to recompute layers in the backward pass, to save memory.
        seed: seed of the adapters.
    """

    name = "come_sp"
    paper = "2510.15304"
    source = "CoMe, single-process distillation"

    def __init__(
        self,
        loss: str = "mse",
        loss_weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        logit_weight: float = 0.0,
        train: str = "layers",
        lora_rank: Any = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        if logit_weight < 0:
            raise ValueError(f"distill.logit_weight={logit_weight}: must be at least 0")
        self.loss: Loss | None = hidden_loss(loss, loss_weights or {}, temperature)
        self.temperature = check_temperature(temperature)
        self.logit_weight, self.train = logit_weight, check_train(train)
        self.rank, self.seed = check_rank(lora_rank), seed
        self.recompute = gradient_checkpointing

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """The sum of the losses of all merged layers; chooses the trained parameters."""
        choose_parameters(pair.student, pair.merged, self.train, self.rank, self.seed)
        return MatchedStates(pair, self.loss, self.logit_weight, self.temperature, self.recompute)

    def write_back(self, objective: Objective, pair: Pair, layer: int | None = None) -> None:
        """Merges the adapters into the weights."""
        merge_lora(pair.student)
