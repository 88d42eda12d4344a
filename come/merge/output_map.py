"""A sublayer's output projection as a least-squares problem: its map, equations and tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from come.linalg.dual import COLUMNS, Dual
from come.linalg.equations import DUAL, Equations, Map, outputs_read
from come.linalg.gram import Gram
from come.linalg.placement import fits, solving_device
from come.models.layer_state import LayerState
from come.models.layout import Sublayer
from come.stream.stream import LayerStream


def output_map(state: LayerState, sublayer: Sublayer) -> Map:
    """The output projection of a sublayer of a layer with these tensors."""
    return Map(sublayer.output_weight(state), state.get(sublayer.bias))


def equations(
    width: int,
    stream: LayerStream,
    *,
    bias: bool,
    eliminates: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Equations:
    """An empty least-squares problem for a map to the residual stream, in the smaller form.

    The inputs of a dual problem are stored like the hidden states, in main memory or on disk, if
    they do not fit into the GPU's memory; on a CPU, if the hidden states are on disk. If the rest
    of the problem does not fit into the GPU's memory either, it is solved in main memory.

    Args:
        width: number of inputs of the map.
        stream: the stream whose tokens will be added; each process adds its own windows.
        bias: whether the map has a bias.
        eliminates: whether columns will be eliminated. The normal equations then need a second
            matrix, and the dual form is smaller from two columns per token on.
        dtype: dtype of the normal equations.
    """
    adapter, tokens = stream.adapter, stream.tokens
    out = adapter.config.hidden_size
    if width < (DUAL if eliminates else 1) * tokens:
        needed = dtype.itemsize * width * ((1.0 + eliminates) * width + 3 * out)
        device = solving_device(adapter.device, needed)
        return Gram(width, out, bias=bias, device=device, dtype=dtype)
    first = stream.own_batches[0].start * stream.windows.shape[1] if stream.own_batches else tokens
    others = 4.0 * (tokens * out + COLUMNS * tokens + width * outputs_read(out)) + 24.0 * tokens**2
    device = adapter.device
    stays = device.type == "cuda" or stream.store == "memory"
    rows: Tensor | None = None
    if not (stays and fits(device, others + 4.0 * tokens * width)):
        rows, device = stream.scratch(width, tokens), solving_device(device, others)
    return Dual(width, out, tokens, bias=bias, device=device, rows=rows, first=first)


def as_tensors(sublayer: Sublayer, found: Map, state: LayerState) -> LayerState:
    """A map as the named tensors of a sublayer's output projection, in the dtypes of `state`."""
    values = sublayer.output_tensors(found.weight)
    if found.bias is not None:
        values[sublayer.bias] = found.bias
    return {name: value.to(state[name]).contiguous() for name, value in values.items()}
