"""The sweep behind the merges: later layers learn to expect what merged ones deliver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from come.calibration.goals import Weighting, token_weights
from come.calibration.stream import LayerStream
from come.models.adapter import LayerState
from come.models.halves import attention_half, ffn_half
from come.models.surgery import Span
from come.refit.ridge import as_tensors, equations, output_map


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
    adapter = stream.adapter
    start = min(index for index, span in enumerate(history) if len(span) > 1)
    states: list[Tensor] = [
        batch.cpu() for _, batch in stream.through(start, stream.route(start, start))
    ]
    found: dict[int, LayerState] = {}
    for index in range(start + 1, len(history)):
        state = adapter.layer_state(index)
        prior = output_map(adapter, adapter.layers[index], "channel")
        sums = equations(prior, adapter)
        for rows, before in zip(stream.batches, states, strict=True):
            keywords = stream.keywords(len(before), index)
            layer = adapter.layers[index]
            _, middle = attention_half(adapter, layer, before.to(adapter.device), keywords)
            features, _ = ffn_half(adapter, layer, middle, keywords)
            output = stream.dense(history[index][-1] + 1, rows)
            sums.add(
                features.flatten(0, 1),
                (output - middle).flatten(0, 1),
                token_weights(output, weighting),
            )
        tensors = as_tensors(
            adapter, "channel", sums.solve(prior, ratio * sums.mean_square()), state
        )
        layer = adapter.scratch_layer(index, {**state, **tensors})
        for number, before in enumerate(states):
            keywords = stream.keywords(len(before), index)
            states[number] = layer(before.to(adapter.device), **keywords).cpu()
        found[index] = tensors
    return found
