"""Greedy continuations of fixed prompts, as a qualitative check of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "In Python, a list comprehension",
)


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel, ids: Int[Tensor, "batch begin"], new_tokens: int, least: int = 0
) -> Int[Tensor, "batch seq"]:
    """Generates greedily, and ignores all other settings of the model's generation configuration.

    Args:
        model: the model.
        ids: token ids of prompts of equal length.
        new_tokens: maximum number of generated tokens.
        least: minimum number of generated tokens.

    Returns:
        Token ids of the prompts and their continuations.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert own is not None
    try:  # generate() takes missing arguments from the model's generation configuration
        model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
        found: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=least or None,
            do_sample=False,
        )
    finally:
        model.generation_config = own
    return found


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int,
    prompts: Sequence[str] = PROMPTS,
) -> list[str]:
    """The greedy continuation of every prompt as text, without the prompt."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = ids.to(model.get_input_embeddings().weight.device)
        output = generate_greedily(model, ids, new_tokens)
        texts.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
