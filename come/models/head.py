"""LM heads that are more than one linear map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """An LM head with what its model does to states before it and to logits after it.

        logits = cap tanh(scale (H before(y) + b) / cap)

    Args:
        linear: the linear map H, b.
        before: applied to the states first; None for nothing.
        scale: multiplies the logits.
        cap: bound of the logits' absolute values; 0 for none.
    """

    def __init__(self, linear: nn.Module, before: nn.Module | None, scale: float, cap: float):
        super().__init__()
        self.linear, self.before, self.scale, self.cap = linear, before, scale, cap

    def forward(self, states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """The logits of states after the final norm."""
        read = states if self.before is None else self.before(states)
        logits: Tensor = self.linear(read) * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits
