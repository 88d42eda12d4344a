"""A layer's output projection as a least-squares problem: its map, Gram matrix and tensors."""

from __future__ import annotations

from torch import nn

from come.linalg.dual import Dual
from come.linalg.equations import Equations, Map
from come.linalg.gram import Gram
from come.models.adapter import ModelAdapter, Unit
from come.models.layer_state import LayerState


def output_map(adapter: ModelAdapter, layer: nn.Module, unit: Unit) -> Map:
    """The output projection (o_proj or down_proj) of a layer, also of a copy."""
    tensors = dict(layer.state_dict())
    weight, *bias = (tensors[name] for name in adapter.output_tensors(unit))
    return Map(weight, bias[0] if bias else None)


def normal_equations(initial: Map, adapter: ModelAdapter) -> Gram:
    """An empty `Gram` for a map shaped as `initial`."""
    out, width = initial.weight.shape
    return Gram(width, out, bias=initial.bias is not None, device=adapter.device)


def equations(
    initial: Map, adapter: ModelAdapter, tokens: int, columns_per_token: int = 1
) -> Equations:
    """An empty problem for a map shaped as `initial`, in the form that is smaller.

    Args:
        initial: the map.
        adapter: the model.
        tokens: number of tokens that will be added.
        columns_per_token: from how many columns on the dual form is taken.
    """
    out, width = initial.weight.shape
    if width < columns_per_token * tokens:
        return normal_equations(initial, adapter)
    return Dual(width, out, tokens, bias=initial.bias is not None, device=adapter.device)


def as_tensors(adapter: ModelAdapter, unit: Unit, found: Map, state: LayerState) -> LayerState:
    """A map as named tensors of a layer, in the dtypes of `state`."""
    values = [found.weight] if found.bias is None else [found.weight, found.bias]
    names = adapter.output_tensors(unit)
    return {
        name: value.to(state[name]).contiguous() for name, value in zip(names, values, strict=True)
    }
