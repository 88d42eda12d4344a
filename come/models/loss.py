"""What stands behind the last layer: cross-entropy and divergence, in blocks of tokens."""

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


@torch.no_grad()
def window_divergence(
    head: nn.Module,
    wanted: Float[Tensor, "batch seq hidden"],
    states: Float[Tensor, "batch seq hidden"],
) -> Float[Tensor, " batch"]:
    """Summed KL(wanted || states) of the next token behind every position, of every window.

    Args:
        head: the map from hidden states to logits.
        wanted: hidden states behind the final norm of the model that is the reference.
        states: those of the other model.

    Returns:
        sum_t sum_v p_t(v) log(p_t(v) / q_t(v)), nats, float32 sums of one block, float64 over
        blocks; >= 0 but for their rounding.
    """
    totals = []
    for right, other in zip(wanted, states, strict=True):
        blocks = [
            torch.nn.functional.kl_div(
                head(b).float().log_softmax(-1),
                head(a).float().log_softmax(-1),
                reduction="sum",
                log_target=True,
            ).double()
            for a, b in zip(right.split(BLOCK), other.split(BLOCK), strict=True)
        ]
        totals.append(torch.stack(blocks).sum())
    return torch.stack(totals)
