"""What stands behind the last layer: cross-entropy and divergence, in blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Predictions:
    """Next-token distributions p of some windows, as far as a divergence from them asks.

    Logits are linear in states, so two numbers for every logit become one row for every token:

        KL(p || q) = sum_v p(v) log p(v) - sum_v p(v) z(v) + log sum_v exp z(v)
        sum_v p(v) z(v) = (sum_v p(v) row_v) y + sum_v p(v) b(v),    z = H y + b

    Attributes:
        rows: mean row of the head under p, float32, [batch, seq, hidden].
        constant: sum_v p(v) (log p(v) - b(v)), nats, float64, [batch, seq].
    """

    rows: Float[Tensor, "batch seq hidden"]
    constant: Float[Tensor, "batch seq"]


@torch.no_grad()
def predictions(head: nn.Module, states: Float[Tensor, "batch seq hidden"]) -> Predictions:
    """What a model predicts behind every position.

    Args:
        head: the linear map from hidden states to logits.
        states: hidden states behind the final norm.
    """
    bias = getattr(head, "bias", None)
    rows, constants = [], []
    for block in states.flatten(0, 1).split(BLOCK):
        logs = head(block).float().log_softmax(-1)
        shares = logs.exp()
        rows.append((shares.to(head.weight.dtype) @ head.weight).float())
        if bias is not None:
            logs -= bias.float()
        constants.append((shares * logs).sum(dim=-1).double())
    shape = states.shape[:2]
    return Predictions(torch.cat(rows).unflatten(0, shape), torch.cat(constants).view(shape))


@torch.no_grad()
def token_divergence(
    head: nn.Module, wanted: Predictions, states: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, "batch seq"]:
    """KL(wanted || states) of the next token behind every position.

    Args:
        head: the linear map from hidden states to logits.
        wanted: what the model that is the reference predicts.
        states: hidden states behind the final norm of the other model.

    Returns:
        sum_v p_t(v) log(p_t(v) / q_t(v)), nats, float64; >= 0 but for the rounding of float32
        logits.
    """
    sizes = [head(block).float().logsumexp(-1) for block in states.flatten(0, 1).split(BLOCK)]
    inner = (wanted.rows.double() * states.double()).sum(dim=-1)
    return wanted.constant - inner + torch.cat(sizes).double().view(inner.shape)
