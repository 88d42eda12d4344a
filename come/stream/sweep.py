"""One forward pass of a model over many windows, also with its layers on disk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.models.adapter import ModelAdapter
from come.stream.stream import LayerStream

STATES = 2**28  # most hidden-state values held during one sweep over layers on disk


@torch.no_grad()
def normed_states(
    adapter: ModelAdapter, windows: Int[Tensor, "windows seq"], batch_size: int
) -> Iterator[tuple[slice, Float[Tensor, "batch seq hidden"]]]:
    """The hidden states after the last norm, batch by batch, with the window indices.

    Layers on disk are read once for as many windows as `STATES` allows.
    """
    group = batch_size
    if adapter.on_disk is not None:
        batch = batch_size * windows.shape[1] * adapter.config.hidden_size
        group = max(1, STATES // batch) * batch_size
    last = adapter.num_layers - 1
    for start in range(0, len(windows), group):
        part = windows[start : start + group]
        with LayerStream(adapter, part, batch_size=batch_size, progress=False) as stream:
            stream.embed()
            for rows, states in stream.through(0, stream.route(0, last)):
                yield slice(start + rows.start, start + rows.stop), adapter.final_norm(states)
