"""Logit distillation of the merged layers, a baseline."""

from __future__ import annotations

from typing import Any

from come.distill.objectives.base import DISTILL
from come.distill.objectives.come_sp import ComeSP


@DISTILL.register
class Logits(ComeSP):
    """KL( softmax(teacher's logits / T) || softmax(student's logits / T) ) alone.

    The same weights train as with CoMe-sp; nothing is asked of hidden states.

    Source: arXiv 1503.02531.

    Args:
        temperature: T.
        train: what of the merged layers trains: layers, norms, outputs, lora.
        lora_rank: of adapters.
        gradient_checkpointing: whether layers run again for the gradient.
        seed: of adapters.
    """

    name = "logits"
    paper = "1503.02531"
    source = "knowledge distillation of the output distribution"

    def __init__(
        self,
        temperature: float = 1.0,
        train: str = "layers",
        lora_rank: Any = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            logit_weight=1.0,
            train=train,
            lora_rank=lora_rank,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        self.loss = None
