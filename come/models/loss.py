"""Cross-entropy and KL divergence from final hidden states, computed in blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from come.models.head import Head

BLOCK = 128  # tokens whose logits are in memory at a time; larger blocks are slower on CPUs
TOKENS, VOCABULARY = 512, 1024  # tokens and vocabulary entries whose logits are summed at a time


def window_nll(
    head: nn.Module, states: Float[Tensor, "batch seq hidden"], ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each window, summed over all its tokens but the first.

    Args:
        head: the LM head.
        states: hidden states after the final norm, any dtype.
        ids: token ids of the windows, on the same device.

    Returns:
        -sum_{t > 1} log p(x_t | x_1 .. x_{t-1}), nats, float64. Sums within a block are float32,
        sums over blocks float64. Gradients flow to `states`.
    """
    if not torch.is_grad_enabled() and not isinstance(head, Head):
        return _window_nll(head, states[:, :-1], ids[:, 1:])
    totals = []
    for window, targets in zip(states[:, :-1], ids[:, 1:], strict=True):
        blocks = [
            nn.functional.cross_entropy(head(block).float(), target, reduction="sum").double()
            for block, target in zip(window.split(BLOCK), targets.split(BLOCK), strict=True)
        ]
        totals.append(torch.stack(blocks).sum())
    return torch.stack(totals)


def _window_nll(
    head: nn.Module, states: Float[Tensor, "batch seq hidden"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """The same without gradients, for a part of the vocabulary at a time, which is faster."""
    rows, bias = head.get_parameter("weight")[targets], getattr(head, "bias", None)
    logits = (rows.float() * states.float()).sum(dim=-1)
    if bias is not None:
        logits += bias[targets].float()
    logits = logits.to(states.dtype).double()  # rounded as the head rounds them
    return (_log_normalizer(head, states).double() - logits).sum(dim=-1)


@dataclass(frozen=True)
class Predictions:
    """Next-token distributions p of windows, reduced to what KL(p || q) needs for any q.

    Logits are linear in the hidden states, so one row of size hidden and one constant per token
    replace the vocabulary-sized distribution:

        KL(p || q) = sum_v p(v) log p(v) - sum_v p(v) z(v) + log sum_v exp z(v)
        sum_v p(v) z(v) = (sum_v p(v) row_v) y + sum_v p(v) b(v),    z = H y + b

    z, y: logits and hidden state of q; H, b: weight, with rows row_v, and bias of the head.

    Where the head is more than a linear map, the hidden states themselves are stored.

    Attributes:
        rows: sum_v p(v) row_v, the mean row of the head under p, float32, [batch, seq, hidden].
        constant: sum_v p(v) (log p(v) - b(v)), nats, float64, [batch, seq]; None if `rows` are
            the hidden states.
    """

    rows: Float[Tensor, "batch seq hidden"]
    constant: Float[Tensor, "batch seq"] | None


@torch.no_grad()
def predictions(head: nn.Module, states: Float[Tensor, "batch seq hidden"]) -> Predictions:
    """The next-token distributions of a model at every position.

    Args:
        head: the LM head.
        states: hidden states after the final norm.
    """
    if isinstance(head, Head):
        return Predictions(states, None)
    bias = getattr(head, "bias", None)
    rows, constants = [], []
    for block in states.flatten(0, 1).split(BLOCK):
        logs = head(block).float().log_softmax(-1)
        shares = logs.exp()
        rows.append(_mean_rows(shares, head.get_parameter("weight")))
        if bias is not None:
            logs -= bias.float()
        constants.append((shares * logs).sum(dim=-1).double())
    shape = states.shape[:2]
    return Predictions(torch.cat(rows).unflatten(0, shape), torch.cat(constants).view(shape))


def _mean_rows(shares: Float[Tensor, "tokens vocab"], weight: Tensor) -> Tensor:
    """The mean row of the head under each distribution, float32, also for half-precision heads."""
    if weight.dtype == torch.float32:
        return shares @ weight
    total = shares.new_zeros(len(shares), weight.shape[1])
    parts = zip(shares.split(VOCABULARY, dim=1), weight.split(VOCABULARY), strict=True)
    for part, rows in parts:
        total.addmm_(part, rows.to(part))
    return total


@torch.no_grad()
def token_divergence(
    head: nn.Module, reference: Predictions, states: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, "batch seq"]:
    """KL(p || q) of the next-token distributions of two models at every position.

    Args:
        head: the LM head, which both models share.
        reference: predictions p of the reference model.
        states: hidden states after the final norm of the other model, whose predictions are q.

    Returns:
        sum_v p_t(v) log(p_t(v) / q_t(v)), nats, float64; >= 0 up to the rounding of float32
        logits, or of the model's dtype if that is narrower.
    """
    if reference.constant is None:
        return _direct_divergence(head, reference.rows, states)
    inner = (reference.rows.double() * states.double()).sum(dim=-1)
    return reference.constant - inner + _log_normalizer(head, states).double()


def _direct_divergence(head: nn.Module, reference: Tensor, states: Tensor) -> Tensor:
    """The same divergence from the states of both models, whose logits are computed anew."""
    found = []
    pairs = (part.flatten(0, 1).split(BLOCK) for part in (reference, states))
    for own, other in zip(*pairs, strict=True):
        logs, others = (head(part).float().log_softmax(-1) for part in (own, other))
        found.append((logs.exp() * (logs - others)).sum(dim=-1).double())
    return torch.cat(found).view(states.shape[:2])


def _log_normalizer(
    head: nn.Module, states: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, "batch seq"]:
    """The normaliser log sum_v exp z(v) of the head's logits z, nats, float32.

    Processes a part of the vocabulary at a time, whose logits fit into the CPU's caches.
    """
    weights = head.get_parameter("weight").split(VOCABULARY)
    bias = getattr(head, "bias", None)
    biases = [None] * len(weights) if bias is None else bias.split(VOCABULARY)
    totals = []
    for block in states.flatten(0, 1).split(TOKENS):
        parts = [
            nn.functional.linear(block, rows, offset).float().logsumexp(-1)
            for rows, offset in zip(weights, biases, strict=True)
        ]
        totals.append(torch.stack(parts).logsumexp(0))
    return torch.cat(totals).view(states.shape[:2])
