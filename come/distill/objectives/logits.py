"""Logit distillation of the merged layers, as a baseline."""

from __future__ import annotations

from typing import Any

from come.distill.objectives.base import DISTILL
from come.distill.objectives.come_sp import ComeSP


@DISTILL.register
class Logits(ComeSP):
    """Minimises only the KL divergence between the teacher's and the student's logits.

        L = KL( softmax(teacher's logits / T) || softmax(student's logits / T) )

    The KL is exact, over the whole vocabulary. By default the same weights are trained as with
    CoMe-sp. Hidden states are not matched.

    Source: arXiv 1503.02531.

    Args:
        temperature: T.
        layers: layers to train: merged, neighbours, all or model.
        train: their parameters to train: layers (all), norms, outputs, norms_outputs or lora.
        layer_decay: factor of the learning rate for each layer of distance from a merged one.
        lora_rank: rank of the adapters; "auto" for as many parameters as the merged layers have.
        gradient_checkpointing: whether to recompute layers in the backward pass, to save memory.
        seed: seed of the adapters.
    """

    name = "logits"
    paper = "1503.02531"
    source = "knowledge distillation of the output distribution"

    def __init__(
        self,
        temperature: float = 1.0,
        layers: str = "merged",
        train: str = "layers",
        layer_decay: float = 1.0,
        lora_rank: Any = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            logit_weight=1.0,
            layers=layers,
            train=train,
            layer_decay=layer_decay,
            lora_rank=lora_rank,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        self.loss = None
