"""Greedy continuations of fixed prompts, as a qualitative check of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from come.data.windows import check_length, check_token_ids
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, Subject
from come.setting import setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


@EVALUATIONS.register
@dataclass
class Continuations(Evaluation):
    """Greedy continuations of prompts, and how far they agree with the dense model's."""

    name = "continuations"

    tokens: int = setting(32, "tokens generated for every prompt", least=1)
    prompts: list[str] = setting(
        [
            "The capital of France is",
            "Water boils when",
            "In Python, a list comprehension",
        ],
        "texts to continue",
    )

    def prepare(self, subject: Subject) -> list[list[int]]:
        """Token ids of the prompts."""
        ids = [subject.tokenizer(text)["input_ids"] for text in self.prompts]
        everything = torch.tensor([[i for words in ids for i in words]])
        what = "eval.continuations.prompts: a prompt"
        check_token_ids(everything, subject.vocabulary, what, subject.tokenizer)
        prompt = max(map(len, ids), default=0)
        key = f"eval.continuations.tokens={self.tokens} after {prompt} of a prompt"
        check_length(key, prompt + self.tokens, subject.longest)
        return ids

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: list[list[int]]
    ) -> Metrics:
        """The continuations, as token ids and as text."""
        device = model.get_input_embeddings().weight.device
        ids: list[list[int]] = []
        for prompt in data:
            begin = torch.tensor([prompt], device=device)
            ids.append(generate_greedily(model, begin, self.tokens)[0, len(prompt) :].tolist())
        texts = [str(tokenizer.decode(own, skip_special_tokens=True)) for own in ids]
        details = {
            "metric": "agreement with dense",
            "ids": ids,
            "texts": dict(zip(self.prompts, texts, strict=True)),
        }
        return {"continuations": Metric(1.0, unit="share", details=details)}

    @classmethod
    def compare(cls, own: Metrics, dense: Metrics, removed: float = 0.0) -> Metrics:
        """Sets the value to the mean share of tokens before the first difference from dense."""
        found, reference = own["continuations"], dense["continuations"]
        pairs = list(zip(found.details["ids"], reference.details["ids"], strict=True))
        shares = [_agreement(mine, its) for mine, its in pairs]
        return {"continuations": replace(found, value=sum(shares) / len(shares))}


def _agreement(own: list[int], other: list[int]) -> float:
    """Number of tokens before the first difference, divided by the longer text's length."""
    same = 0
    for mine, its in zip(own, other, strict=False):
        if mine != its:
            break
        same += 1
    return same / max(len(own), len(other), 1)
