"""How far a model's predictions are from the dense model's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from come.models.adapter import ModelAdapter
from come.models.loss import predictions, token_divergence
from come.stream.sweep import normed_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DenseReference:
    """The dense model's predictions, to which those of merged models are compared.

    Args:
        model: the dense model.
        windows: token ids, [windows, seq] int64.
        batch_size: windows of a forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Int[Tensor, "windows seq"], batch_size: int
    ) -> None:
        self._windows, self._batch_size = windows, batch_size
        adapter = ModelAdapter(model)
        self._predictions = [
            predictions(adapter.head, states)
            for _, states in normed_states(adapter, windows, batch_size)
        ]

    def divergence(self, model: PreTrainedModel) -> float:
        """Mean over tokens of KL(dense || model) of the next-token distributions, nats, >= 0.

        Raises:
            ValueError: it is not finite.
        """
        adapter, total = ModelAdapter(model), 0.0
        batches = normed_states(adapter, self._windows, self._batch_size)
        for reference, (_, states) in zip(self._predictions, batches, strict=True):
            total += token_divergence(adapter.head, reference, states).sum().item()
        mean = total / self._windows.numel()
        if not math.isfinite(mean):
            raise ValueError(
                "the predictions of a merged model are not finite; try model.dtype=float32 or "
                "bfloat16"
            )
        return max(0.0, mean)  # rounding can make it negative
