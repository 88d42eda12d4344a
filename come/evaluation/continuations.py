"""Greedy continuations of fixed prompts: what the numbers look like as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "In Python, a list comprehension",
)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int,
    prompts: Sequence[str] = PROMPTS,
) -> list[str]:
    """The greedy continuation of every prompt, without the prompt."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = ids.to(model.get_input_embeddings().weight.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        texts.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
