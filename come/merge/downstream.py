"""The sweep behind the merges: later layers learn to expect what merged ones deliver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import Weighting, token_weights
from come.models.adapter import LayerState
from come.models.sublayers import run_attention, run_mlp
from come.models.surgery import Span
from come.stream.stream import LayerStream


@torch.no_grad()
def finish(
    stream: LayerStream, history: Sequence[Span], ratio: float, weighting: Weighting = "relative"
) -> dict[int, LayerState]:
    """Refits the FFN output map of every layer behind the first merged one, in depth order.

        W_d = argmin sum_t w_t | (h_b - h') - W f |^2 + lambda mean diag(G) |W - W_d0|^2

    h' and f: what the layer makes of the merged model's states, layers in front of it already
    refitted; h_b: the dense model's state behind the last original layer that it stands for. So
    the error that merges left is taken back little by little. The model is not changed.

    Source: this project.

    Args:
        stream: its boundaries up to the first merged layer, and the dense model's.
        history: original layers behind every layer of the model.
        ratio: lambda.
        weighting: of tokens.

    Returns:
        For every such layer its new tensors.
    """
    start = min(index for index, span in enumerate(history) if len(span) > 1)
    found: dict[int, LayerState] = {}
    with stream.scratch_boundary("finish") as states:
        for rows, batch in stream.through(start, stream.route(start, start)):
            states[rows] = batch
        for index in range(start + 1, len(history)):
            found[index] = _refitted(stream, states, index, history[index][-1], ratio, weighting)
    return found


def _refitted(
    stream: LayerStream,
    states: Tensor,
    index: int,
    original: int,
    ratio: float,
    weighting: Weighting,
) -> LayerState:
    """The new output map of layer `index`; `states` go from its input to its new output."""
    adapter, layer = stream.adapter, stream.adapter.layers[index]
    prior = output_map(adapter, layer, "channel")
    sums = equations(prior, adapter)
    for rows in stream.batches:
        before = states[rows].to(adapter.device)
        keywords = stream.keywords(len(before), index)
        _, middle = run_attention(adapter, layer, before, keywords)
        features, _ = run_mlp(adapter, layer, middle, keywords)
        output = stream.dense(original + 1, rows)
        sums.add(
            features.flatten(0, 1),
            (output - middle).flatten(0, 1),
            token_weights(output, weighting),
        )
    state = adapter.layer_state(index)
    solved = sums.solve(prior, ratio * sums.mean_diagonal())
    tensors = as_tensors(adapter, "channel", solved, state)
    layer = adapter.copy_layer(index, {**state, **tensors})
    for rows in stream.batches:
        before = states[rows].to(adapter.device)
        states[rows] = layer(before, **stream.keywords(len(before), index))
    return tensors
