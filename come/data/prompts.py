"""Prompts that an instruct model answers for its calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from come.data.rows import Chat, document_text
from come.data.windows import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FREE = -1  # in place of a token that the model draws
PROMPTS = (
    "Explain how a refrigerator keeps food cold.",
    "Why does the moon show different phases during a month?",
    "What happens inside a plant during photosynthesis?",
    "Describe how vaccines prepare the immune system for an infection.",
    "Why is the sky blue during the day and red at sunset?",
    "Explain the difference between weather and climate to a ten-year-old.",
    "Give three causes of the First World War and explain one of them.",
    "Who were the Phoenicians, and what are they remembered for?",
    "How did the printing press change life in Europe?",
    "Summarise the plot of Romeo and Juliet in five sentences.",
    "List ten tips for someone who moves into a first flat.",
    "List the planets of the solar system with one fact about each.",
    "Name five rivers and the countries that they flow through.",
    "Write a recipe for a simple vegetable soup.",
    "Plan a weekend trip to a city by the sea.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Write a poem of eight lines about the first day of snow.",
    "Write a dialogue between a teacher and a student who is late.",
    "Write a polite email that asks a colleague to move a meeting to Friday.",
    "Write a product description for a wooden desk lamp.",
    "Write a cover letter for a job in a public library.",
    "Rewrite this sentence in plain words: The committee deferred its decision pending review.",
    "Correct the grammar: She don't have no time for reading the books yesterday.",
    "Translate into French, German and Spanish: Where is the nearest train station?",
    "Compare travelling by train with travelling by car.",
    "Compare renting a home with buying one, with the arguments for each.",
    "What are the advantages and disadvantages of working from home?",
    "Should homework be abolished? Argue for both sides.",
    "Write a Python function that counts the words of a text, and explain it.",
    "What does a database index do, and when does it slow things down?",
    "Explain recursion with an example in code.",
    "Write an SQL query that finds the customers with more than three orders.",
    "A shirt costs 40 euros after a discount of 20%. What did it cost before? Show the steps.",
    "Solve 3x + 7 = 22 and explain every step.",
    "How many ways are there to arrange the letters of the word LEVEL?",
    "What is the difference between the mean and the median? Give an example.",
    "How does compound interest work?",
    "What should I do about a headache after a long day at a screen?",
    "How can I learn a new language in half an hour a day?",
    "Answer with yes or no, and one reason: Is a tomato a fruit?",
)


def chat_prompts(tokenizer: PreTrainedTokenizerBase, begin: int | None = None) -> list[list[int]]:
    """Token ids of every prompt: a user turn, and the beginning of the model's answer.

    The chat template writes its own special tokens, so the tokenizer adds none.

    Args:
        tokenizer: the model's tokenizer, with a chat template.
        begin: token that every window begins with. It is added only to prompts that the template
            does not begin with it; None for none.

    Raises:
        ValueError: there is no chat template, or it cannot render a user turn.
    """
    chats: list[Chat] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [document_text(chat, tokenizer, answer=True) for chat in chats]
    found = [tokenize(tokenizer, text, special=False).tolist() for text in texts]
    return [ids if begin is None or ids[:1] == [begin] else [begin, *ids] for ids in found]


def prompt_starts(
    prompts: Sequence[Sequence[int]], count: int, generator: torch.Generator
) -> Int[Tensor, "windows begin"]:
    """The first tokens of `count` windows: all prompts in random order, then in another order.

    Args:
        prompts: token ids of the prompts.
        count: number of windows.
        generator: CPU random generator of the orders.

    Returns:
        The prompts, with `FREE` after the last token of the shorter ones.
    """
    rounds = -(-count // len(prompts))
    orders = [torch.randperm(len(prompts), generator=generator) for _ in range(rounds)]
    rows = [torch.tensor(prompts[index]) for index in torch.cat(orders)[:count].tolist()]
    return pad_sequence(rows, batch_first=True, padding_value=FREE)
