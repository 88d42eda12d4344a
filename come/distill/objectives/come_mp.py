"""CoMe-mp: trains every merged layer separately on the teacher's hidden states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor

from come.distill.losses import Loss, hidden_loss
from come.distill.objectives.base import DISTILL, Distillation, Objective, Pair
from come.distill.trainable import check_train, choose_in_layer
from come.models.adapter import ModelAdapter
from come.models.sublayers import run_layer


class OneLayer(Objective):
    """The loss of one merged layer that maps the teacher's states before its span to those after.

    Args:
        pair: student and teacher; they are not changed, and no reference to them is stored.
        index: index of the merged layer.
        loss: loss between hidden states.
        train: which of the layer's weights to train.
    """

    def __init__(self, pair: Pair, index: int, loss: Loss, train: str) -> None:
        super().__init__()
        adapter = pair.student
        self.layer = copy.deepcopy(adapter.layers[index])
        choose_in_layer(adapter, index, self.layer, train)
        self.index = index
        self._loss = loss
        self._keywords: dict[int, dict[str, Any]] = {}

    def expect(self, student: ModelAdapter, ids: Tensor) -> None:
        """Computes the layer's keyword arguments (mask, positions) for batches of this shape."""
        self._keywords[len(ids)] = student.layer_inputs(ids)[1][self.index]

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """The "loss" for states before and after the span, [batch, seq, hidden] each."""
        before, after = batch
        parameter = next(self.layer.parameters())
        keywords = send_to_device(self._keywords[len(before)], parameter.device)
        return {
            "loss": self._loss(run_layer(self.layer, before.to(parameter.dtype), keywords), after)
        }


@DISTILL.register
class ComeMP(Distillation):
    """Trains each merged layer separately to map the teacher's h_{a-1} to the teacher's h_b.

        L_k = loss( layer_k(h_{a-1} of the teacher), h_b of the teacher )

    for every merged layer k that replaces the teacher's layers a..b. The layers are independent:
    they are trained in sequence, with the gradients and optimiser state of one layer in memory at
    a time, or in parallel.

    Source: arXiv 2510.15304, CoMe-mp. Differs from the paper in the default loss (see `come_sp`).
    Optimiser, schedule and text are our choice.

    Args:
        loss: mse, kl (the paper's), cosine or mix.
        loss_weights: weights of the terms of "mix".
        temperature: T of the KL.
        train: weights of the merged layer to train: layers (all), norms, outputs or norms_outputs.
    """

    name = "come_mp"
    paper = "2510.15304"
    source = "CoMe, multi-process distillation"
    layerwise = True

    def __init__(
        self,
        loss: str = "mse",
        loss_weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        train: str = "layers",
    ) -> None:
        self.loss = hidden_loss(loss, loss_weights or {}, temperature)
        self.train = check_train(train)
        if train == "lora":
            raise ValueError(
                "distill.train=lora: distill=come_mp trains layers, norms, outputs or norms_outputs"
            )

    def objective(self, pair: Pair, layer: int | None = None) -> Objective:
        """The loss of merged layer `layer`."""
        assert layer is not None
        return OneLayer(pair, layer, self.loss, self.train)
