"""Downstream refit: fits the layers after a merge to the hidden states that they now receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import Weighting, token_weights
from come.models.layer_state import LayerState
from come.models.sublayers import hidden_features, run_layer, states_after
from come.models.surgery import Span
from come.stream.stream import LayerStream


@torch.no_grad()
def refit_downstream(
    stream: LayerStream, history: Sequence[Span], ratio: float, weighting: Weighting = "relative"
) -> dict[int, LayerState]:
    """Refits the last output projection of every layer after the first merged one, in depth order.

        W_d = argmin sum_t w_t | (h_b - h') - W f |^2 + lambda mean diag(G) |W - W_d0|^2

    h' and f: the residual stream before the layer's last sublayer and the input of its output
    projection, in the merged model with all earlier layers already refitted; h_b: the dense model's
    hidden states after the last original layer that the layer represents. Each layer thus corrects
    part of the error that the merges left. The model is not changed.

    Source: this project.

    Args:
        stream: has the boundaries up to the first merged layer, and the dense model's boundaries.
        history: original layers merged into each layer of the model.
        ratio: lambda.
        weighting: token weighting, see `token_weights`.

    Returns:
        The new tensors of every refitted layer, by layer.
    """
    start = min(index for index, span in enumerate(history) if len(span) > 1)
    found: dict[int, LayerState] = {}
    with stream.scratch_boundary("downstream") as states:
        for rows in stream.own_batches:
            states[rows] = stream.run(start, stream.boundary(start, rows))
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
    """The new output projection of layer `index`; replaces `states`, its input, with its output."""
    adapter, layer = stream.adapter, stream.adapter.layer(index)
    layout = adapter.layer_layout(index)
    sublayer, earlier = layout.last, layout.before(layout.last)
    source = layout.read_after(sublayer)
    initial = output_map(layer.state_dict(), sublayer)
    bias = initial.bias is not None
    sums = equations(initial.weight.shape[1], stream, bias=bias)
    for rows in stream.own_batches:
        before = states[rows].to(adapter.device)
        keywords = stream.keywords(len(before), index)
        after = read = before
        if earlier:
            after = read = states_after(layer, layout, earlier[-1], before, keywords)
        if source is None:
            read = before
        elif source != earlier[-1]:
            read = states_after(layer, layout, source, before, keywords)
        features = hidden_features(layer, layout, sublayer, read, keywords)
        output = stream.dense(original + 1, rows)
        sums.add(
            features.flatten(0, 1),
            ((output - after) / sublayer.factor).flatten(0, 1),
            token_weights(output, weighting),
        )
    sums.all_reduce(stream.processes)
    state = adapter.layer_state(index)
    solved = sums.solve(initial, ratio * sums.mean_diagonal(), consume=True)
    tensors = as_tensors(sublayer, solved, state)
    layer = adapter.copy_layer(index, {**state, **tensors})
    for rows in stream.own_batches:
        before = states[rows].to(adapter.device)
        states[rows] = run_layer(layer, before, stream.keywords(len(before), index))
    return tensors
