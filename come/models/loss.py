"""The model's loss behind its last layer: head and cross-entropy, in blocks of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

BLOCK = 128  # tokens whose logits over the vocabulary exist at a time; larger is slower on CPUs


def window_nll(
    head: nn.Module, states: Float[Tensor, "batch seq hidden"], ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Summed negative log-likelihood of every token but the first, of every window.

    Args:
        head: the map from hidden states to logits.
        states: hidden states behind the final norm, any dtype.
        ids: the windows' tokens, on the same device.

    Returns:
        -sum_{t > 1} log p(x_t | x_1 .. x_{t-1}), nats, float32 sums of one block, float64 over
        blocks. Gradients flow to `states`.
    """
    totals = []
    for window, targets in zip(states[:, :-1], ids[:, 1:], strict=True):
        blocks = [
            torch.nn.functional.cross_entropy(head(block).float(), wanted, reduction="sum").double()
            for block, wanted in zip(window.split(BLOCK), targets.split(BLOCK), strict=True)
        ]
        totals.append(torch.stack(blocks).sum())
    return torch.stack(totals)
