"""RWKV's weighted averages of all tokens at once, for training on a CPU.

transformers loops over tokens there, which costs ten times the rest of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor
from transformers.models.rwkv import modeling_rwkv

_LEAST = -60.0  # exponents below it are raised to it, so that no denominator is zero


def wkv(
    time_decay: Float[Tensor, " channels"],
    time_first: Float[Tensor, " channels"],
    key: Float[Tensor, "batch seq channels"],
    value: Float[Tensor, "batch seq channels"],
    state: None = None,
    return_state: bool = False,
) -> tuple[Float[Tensor, "batch seq channels"], None]:
    """RWKV-4's attention without a state, as `modeling_rwkv.rwkv_linear_attention_cpu` has it.

        y_t = (sum_{s<t} e^{-(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same without v)

    w = e^time_decay, u = time_first. Keys are relative to their maximum over the window, which
    leaves y as it is. The sums are prefix sums with a decay, in log2(seq) steps.
    """
    assert state is None
    assert not return_state
    decay = -torch.exp(time_decay)
    weight = (key - key.detach().amax(dim=1, keepdim=True)).clamp_min(_LEAST).exp()
    sums = torch.stack([weight * value, weight])
    now = sums * time_first.exp()
    span = 1
    while span < key.shape[1]:
        earlier = F.pad(sums[:, :, :-span], (0, 0, span, 0))
        sums = torch.addcmul(sums, earlier, torch.exp(decay * span).expand_as(earlier))
        span *= 2
    numerator, denominator = F.pad(sums[:, :, :-1], (0, 0, 1, 0)) + now
    return numerator / denominator, None


@contextmanager
def all_tokens_at_once() -> Iterator[None]:
    """RWKV models use `wkv` inside the block; they must run without a cache."""
    plain = modeling_rwkv.rwkv_linear_attention
    modeling_rwkv.rwkv_linear_attention = wkv
    try:
        yield
    finally:
        modeling_rwkv.rwkv_linear_attention = plain
