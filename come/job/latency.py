"""Times of a model's layers at several FFN widths, measured on this machine."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from come.evaluate.speed import seconds
from come.merge.budget import NARROWEST
from come.merge.shape_costs import LatencyShare
from come.models.adapter import ModelAdapter
from come.models.sublayers import run_layer
from come.models.width import CHANNEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPEATS = 9
_WIDTHS = 4  # measured, from all channels to the narrowest candidate


@torch.inference_mode()
def measure_latency(
    model: PreTrainedModel, window: Int[Tensor, "1 seq"], full: int
) -> LatencyShare:
    """Measures what `LatencyShare` adds up, for one prompt: the tokens of a window.

    The time of a layer is that of the first layer of each kind, averaged over the model's layers.
    A narrower layer has the first channels of the same layer. The rest is the embedding of the
    tokens, masks and positions, the final norm, and the logits of the last token. Each time is the
    median of 9 after a warm-up; all parts take turns, so that other load affects all of them.
    Layers on disk are in memory while they are measured.

    Args:
        model: the dense model.
        window: token ids of one window; the batch size is 1.
        full: FFN channels of every layer; 0 to measure layers at their full width only.
    """
    adapter = ModelAdapter(model)
    states, keywords = adapter.layer_inputs(window)
    counts = Counter(adapter.layout.layers)
    step = (1 - NARROWEST) / (_WIDTHS - 1)
    widths = {max(1, round((1 - step * n) * full)) for n in range(_WIDTHS)} if full else {0}
    works: dict[tuple[int, int], Callable[[], object]] = {}
    for layout in counts:
        index = adapter.layout.layers.index(layout)
        for width in widths:
            layer = _narrower(adapter, index, width)
            works[index, width] = partial(run_layer, layer, states, keywords[index])
    works[-1, 0] = lambda: adapter.head(adapter.final_norm(adapter.layer_inputs(window)[0][:, -1:]))
    taken: dict[tuple[int, int], list[float]] = {key: [] for key in works}
    for _ in range(_REPEATS + 1):
        for key, work in works.items():
            taken[key].append(seconds(model, work))
    medians = {key: statistics.median(found[1:]) for key, found in taken.items()}
    times = {
        width: sum(
            number * medians[adapter.layout.layers.index(layout), width]
            for layout, number in counts.items()
        )
        / adapter.num_layers
        for width in widths
    }
    return LatencyShare(medians[-1, 0], times, adapter.num_layers, full)


def _narrower(adapter: ModelAdapter, index: int, channels: int) -> nn.Module:
    """A copy of layer `index` with its first FFN channels; with all of them for 0."""
    state = dict(adapter.layer_state(index))
    for name, role in adapter.roles(index).items():
        if channels and role.unit == CHANNEL:
            chosen = torch.cat(role.indices(role.count(state[name]), range(channels)))
            state[name] = state[name].index_select(role.axis, chosen.to(state[name].device))
    return adapter.copy_layer(index, state)
