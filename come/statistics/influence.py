"""Block influence, and the cosine similarities it is computed from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

TOKENS = Literal["all", "last"]
_CHUNK = 256  # tokens per block; their float64 copies fit into the CPU cache


def check_tokens(tokens: str) -> TOKENS:
    """Raises ValueError unless `tokens` is one of "all", "last"."""
    for allowed in get_args(TOKENS):
        if tokens == allowed:
            return allowed
    raise ValueError(f"merge.tokens={tokens!r}: allowed are {', '.join(get_args(TOKENS))}")


def chosen_tokens(
    states: Float[Tensor, "batch seq hidden"], tokens: TOKENS
) -> Float[Tensor, "batch chosen hidden"]:
    """The hidden states of all tokens, or of the last token of each window."""
    return states if tokens == "all" else states[:, -1:]


def token_cosine(
    before: Float[Tensor, "*batch hidden"], after: Float[Tensor, "*batch hidden"]
) -> Float[Tensor, " tokens"]:
    """cos(before, after) of every token, flattened, float64.

    Adjacent layers have cosines near 1, where arccos loses half of the digits, hence float64.
    """
    cosines = []
    width = before.shape[-1]
    for x, y in zip(
        before.reshape(-1, width).split(_CHUNK), after.reshape(-1, width).split(_CHUNK), strict=True
    ):
        x, y = x.double(), y.double()
        norms = torch.linalg.vecdot(x, x) * torch.linalg.vecdot(y, y)
        cosines.append(torch.linalg.vecdot(x, y) / norms.sqrt().clamp_min(1e-300))
    return torch.cat(cosines)


def block_influence(cosine: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """1 - clamp(cos, 0, 1) of every token, in [0, 1]; its mean is BI (arXiv 2403.03853)."""
    return 1 - cosine.clamp(0, 1)
