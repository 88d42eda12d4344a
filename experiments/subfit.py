"""A bound for sublayers dropped apart: each leaves a free linear map of the residual stream.

    python experiments/subfit.py TEXT --depths 27,24,21

Drops the attention and FFN sublayers that merge=subfit chooses at the cost of these depths, and
adds to the residual stream x, in place of each of them,

    B x,    B = argmin sum_t w_t | y_t - x_t - B x_t |^2,    w_t = 1 / mean_channels(y_t^2)

x: the stream before the sublayer, after all drops and maps before it; y: the dense model's stream
after the sublayer. Maps are fitted from the first layer to the last.

Source: arXiv 2606.02559 (SubFit), whose maps have a low rank. B is a d x d matrix of the residual
stream, which no tensor of an ordinary checkpoint can hold, and its parameters are not counted: the
numbers are a bound, not those of a method of conf/merge. merge=subfit refits the output projection
before the dropped sublayers, which can be saved. Perplexity over the last 20% of TEXT, as in
experiments/beyond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from ghosted import arguments_of, linear_map, windows_of
from torch import Tensor

import come
from come.merge.dropped import SublayerDrops
from come.merge.method import Method
from come.merge.reconstruction import token_weights
from come.merge.schedules.subfit import SubFit, inner_streams, sublayer_costs
from come.models.adapter import ModelAdapter
from come.models.layout import Sublayer
from come.models.sublayers import states_after
from come.stream.stream import LayerStream

if TYPE_CHECKING:
    from torch import nn


def method() -> Method:
    """The method merge=subfit, as far as the choice reads it."""
    return Method(
        operator="drop", selection="cosine", retention="bi_power", schedule="subfit",
        refit="ridge", m=2,
    )  # fmt: skip


@contextmanager
def bypassed(layer: nn.Module, sublayer: Sublayer, change: Tensor) -> Iterator[None]:
    """Makes a sublayer add x `change` to each row x of the residual stream while open.

    `change`: [hidden, hidden], the transposed map B.
    """
    if sublayer.norm is None or sublayer.post_norm or sublayer.experts or sublayer.joined:
        raise ValueError(f"{sublayer.name} is not a norm, then a map to the residual stream")
    seen = dict[str, Tensor]()

    def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["states"] = inputs[0]

    def added(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        states = seen["states"]
        return (states @ change.to(states) / sublayer.factor).view(output.shape)

    handles = [
        layer.get_submodule(sublayer.norm.module).register_forward_pre_hook(read),
        layer.get_submodule(sublayer.output).register_forward_hook(added),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_bypasses(stream: LayerStream, drops: SublayerDrops) -> Iterator[None]:
    """Replaces the dropped sublayers of the stream's model by fitted maps while open.

    The stream must have a snapshot of the dense model, whose boundaries are all valid.
    """
    adapter, hidden = stream.adapter, stream.adapter.config.hidden_size
    with ExitStack() as stack:
        for index in sorted({dropped.layer for dropped in drops.sublayers}):
            if stream.valid < index:
                stream.advance(stream.valid, index - 1)
            kinds = [dropped.kind for dropped in drops.sublayers if dropped.layer == index]
            dense = [inner_streams(stream, index, rows, stream.dense) for rows in stream.batches]
            for number, sublayer in enumerate(adapter.layer_layout(index)):
                if sublayer.kind in kinds:
                    targets = [streams[number + 1] for streams in dense]
                    change = linear_map(_missing(stream, index, number, targets), hidden)
                    stack.enter_context(bypassed(adapter.layer(index), sublayer, change))
            stream.invalidate_from(index)
        yield
    stream.invalidate_from(0)


def _missing(
    stream: LayerStream, index: int, number: int, targets: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of x and y - x for a sublayer of layer `index`, each times sqrt(w)."""
    adapter = stream.adapter
    layer, layout = adapter.layer(index), adapter.layer_layout(index)
    for rows, after in zip(stream.batches, targets, strict=True):
        states = stream.boundary(index, rows)
        if number:
            before, keywords = layout.sublayers[number - 1], stream.keywords(len(states), index)
            states = states_after(layer, layout, before, states, keywords)
        root = token_weights(after, "relative").sqrt().view(*after.shape[:2], 1)
        yield root * states, root * (after - states)


@torch.no_grad()
def main() -> None:
    arguments = arguments_of(__doc__.splitlines()[0])
    model, tokenizer = come.load_model(arguments.model, dtype="float32")
    windows, unseen = windows_of(arguments, tokenizer)
    adapter, chosen = ModelAdapter(model), method()
    chosen.check_layers(adapter.layout.layers)
    depths = [int(depth) for depth in arguments.depths.split(",")]
    dense = come.perplexity(model, unseen).value
    with LayerStream(adapter, windows) as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1)
        stream.snapshot_dense()
        costs = sublayer_costs(stream, "relative", linear=True)
        for depth in depths:
            drops = SubFit.cheapest(adapter, costs, chosen, depth)
            with with_bypasses(stream, drops):
                found = come.perplexity(model, unseen).value
            print(
                f"bound, at the cost of {depth} layers, without {drops.described()}: "
                f"{found / dense:.3f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
