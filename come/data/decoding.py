"""Attention of single tokens on the CPU, for sampling text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "come_single_token"


def single_token_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q K^T scaling) V of one token per row: query heads that share keys are read as rows.

    PyTorch's CPU kernel then reads the keys of a group once, not once for each head. More tokens,
    masks and other settings go to the interface of this kernel in transformers, whose arguments
    these are.

    Args:
        module: the attention layer.
        query: [batch, heads, 1, width].
        key: [batch, groups, seq, width]; groups divides heads.
        value: [batch, groups, seq, width].
        attention_mask: None if the token sees all keys.
        scaling: factor of the products.
        **others: further settings of the layer.

    Returns:
        [batch, 1, heads, width], and None for the attention weights.
    """
    batch, heads, tokens, width = query.shape
    if tokens > 1 or attention_mask is not None or scaling is None or others.get("softcap"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    grouped = query.reshape(batch, key.shape[1], -1, width)
    found = scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return found.reshape(batch, 1, heads, width), None


@contextmanager
def fast_single_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Uses `single_token_attention` on the CPU, and restores the model's attention at the end."""
    own = model.config._attn_implementation
    if model.device.type != "cpu" or own != "sdpa":
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, single_token_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(own)
