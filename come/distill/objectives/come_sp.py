"""CoMe-sp: trains all merged layers of the student jointly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from come.distill.hidden_states import states_by_layer
from come.distill.losses import Loss, check_temperature, hidden_loss, logit_kl, task_loss
from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair, StorableTeacher
from come.distill.trainable import (
    check_layers,
    check_rank,
    check_train,
    choose_parameters,
    first_trained,
    layer_rates,
    merge_lora,
)
from come.models.adapter import ModelAdapter


class MatchedStates(StorableTeacher):
    """Sum over the merged layers k of the loss between the student's h_k and the teacher's h_b.

    Student and teacher run one forward pass each. If the layers before the first trained layer
    equal the teacher's, they run only once, in the teacher. The layers after the last merged layer
    run only for the logit loss, and in the student for validation.

    After `release_teacher`, the teacher's states come with the batch and the teacher does not run.

    Args:
        pair: student, with its trained parameters chosen, and teacher.
        loss: loss between hidden states; None for no such loss.
        logit_weight: weight of the KL between logits; 0 for none.
        temperature: temperature of that KL.
        recompute: whether to recompute the student's layers in the backward pass, to save memory.
        layer_decay: see `layer_rates`.
    """

    def __init__(
        self,
        pair: Pair,
        loss: Loss | None,
        logit_weight: float = 0.0,
        temperature: float = 1.0,
        recompute: bool = False,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = pair.student.model
        self._own, self._history, self._merged = pair.student, pair.history, pair.merged
        self._loss, self._logit_weight, self._temperature = loss, logit_weight, temperature
        self._recompute, self._layer_decay = recompute, layer_decay
        first = min(pair.merged[0], first_trained(pair.student))
        self._first = first if _layers_before_equal(pair, first) else 0
        start = {self._history[self._first][0] - 1} if self._first else set()
        ends = {self._history[k][-1] for k in self._merged} if loss else set()
        last = {pair.teacher.num_layers - 1} if logit_weight else set()
        self.after = sorted(start | ends | last)
        self._teacher: tuple[ModelAdapter, ...] = (pair.teacher,)
        self._head = (pair.teacher.final_norm, pair.teacher.head)  # tuples hide modules

    @property
    def rates(self) -> dict[str, float]:
        """Factors of the learning rate by name, see `layer_rates`."""
        return layer_rates(self._own, "student.", self.trained, self._merged, self._layer_decay)

    def release_teacher(self) -> None:
        """Frees the teacher's weights: batches then have its states after the layers `after`.

        The teacher's final norm and head are the student's if they are equal and not trained,
        otherwise copies of the teacher's.
        """
        (teacher,), self._teacher = self._teacher, ()
        own, other = self._own, teacher
        embeddings = [own.model.get_output_embeddings(), other.model.get_output_embeddings()]
        pairs = [(own.final_norm, other.final_norm), tuple(embeddings)]
        trains = any(p.requires_grad for module, _ in pairs for p in module.parameters())
        if not trains and all(_equal(one, two) for one, two in pairs):
            self._head = (own.final_norm, own.head)
        else:
            self._head = copy.deepcopy((other.final_norm, other.head))
        teacher.model.to("meta")  # frees its weights

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The losses on windows [batch, seq]: "loss", "layer_K" per merged layer K, "logits".

        The windows are followed by the teacher's states, [batch, seq, hidden] each, after
        `release_teacher`.
        """
        return self._losses(batch, whole=self._logit_weight > 0)[0]

    def validate(self, *batch: Tensor) -> dict[str, Tensor]:
        """The same losses, and "nll": the student's cross-entropy, nats per predicted token."""
        losses, states = self._losses(batch, whole=True)
        own = self._own
        losses["nll"] = task_loss(own.head, own.final_norm(states), batch[0])
        return losses

    def _losses(self, batch: tuple[Tensor, ...], whole: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and the student's states after the last layer that was run."""
        (ids, *stored), history, merged = batch, self._history, self._merged
        student = self._own
        depth = len(history) if whole else merged[-1] + 1
        if self._teacher:
            with torch.no_grad():
                dense = states_by_layer(self._teacher[0], ids, max(self.after), self.after)
        else:
            dense = dict(zip(self.after, stored, strict=True))
        start = None
        if self._first:
            start = dense[history[self._first][0] - 1].to(student.model.dtype)
        found = states_by_layer(
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
        if self._logit_weight:
            norm, head = self._head
            with torch.no_grad():
                expected = norm(dense[self.after[-1]])
            losses["logits"] = logit_kl(
                student.head, student.final_norm(states), head, expected, self._temperature
            )
            total = total + self._logit_weight * losses["logits"]
        return {"loss": total, **losses}, states


def _layers_before_equal(pair: Pair, first: int) -> bool:
    """Whether the embeddings and the layers before layer `first` equal the teacher's."""
    own, other = pair.student, pair.teacher
    modules = [(own.model.get_input_embeddings(), other.model.get_input_embeddings())]
    modules += [(own.layers[k], other.layers[k]) for k in range(first)]
    return all(_equal(one, two) for one, two in modules)


def _freeze_after(student: ModelAdapter, last: int) -> None:
    """Freezes what comes after layer `last`, which has no gradient without the logit loss."""
    model = student.model
    modules = [*student.layers[last + 1 :], student.final_norm]
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        modules.append(model.get_output_embeddings())
    for module in modules:
        module.requires_grad_(False)


def _equal(own: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have equal tensors, in the dtypes and on the devices of the second.

    A half-precision student may train in float32, and waits on the CPU for a stored teacher.
    """
    pairs = zip(own.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.to(b), b) for a, b in pairs)


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
        layers: layers to train: merged, neighbours, all or model.
        train: their parameters to train: layers (all), norms, outputs, norms_outputs or lora.
        layer_decay: factor of the learning rate for each layer of distance from a merged one.
        lora_rank: rank of the adapters; "auto" for as many parameters as the merged layers have.
        gradient_checkpointing: whether to recompute layers in the backward pass, to save memory.
        seed: seed of the adapters.
    """

    name = "come_sp"
    paper = "2510.15304"
    source = "CoMe, single-process distillation"
    can_store = True

    def __init__(
        self,
        loss: str = "mse",
        loss_weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        logit_weight: float = 0.0,
        layers: str = "merged",
        train: str = "layers",
        layer_decay: float = 1.0,
        lora_rank: Any = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        if logit_weight < 0:
            raise ValueError(f"distill.logit_weight={logit_weight}: must be at least 0")
        self.loss: Loss | None = hidden_loss(loss, loss_weights or {}, temperature)
        self.temperature = check_temperature(temperature)
        self.logit_weight, self.layer_decay = logit_weight, layer_decay
        self.layers, self.train = check_layers(layers, train), check_train(train)
        self.rank, self.seed = check_rank(lora_rank), seed
        self.recompute = gradient_checkpointing

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """The sum of the losses of all merged layers; chooses the trained parameters."""
        choose_parameters(
            pair.student, pair.merged, self.train, self.rank, self.seed, layers=self.layers
        )
        if not self.logit_weight:
            _freeze_after(pair.student, pair.merged[-1])
        return MatchedStates(
            pair,
            self.loss,
            self.logit_weight,
            self.temperature,
            self.recompute,
            self.layer_decay,
        )

    def write_back(self, pair: Pair) -> None:
        """Merges the adapters into the weights."""
        merge_lora(pair.student)
