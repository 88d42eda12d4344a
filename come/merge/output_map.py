"""A layer's output map as a least-squares problem: its matrix, its sums, its tensors."""

from __future__ import annotations

from torch import nn

from come.linalg.gram import Gram, Map
from come.models.adapter import LayerState, ModelAdapter, Unit


def output_map(adapter: ModelAdapter, layer: nn.Module, unit: Unit) -> Map:
    """The output map of a layer of the model, or of one beside it, in float64."""
    tensors = dict(layer.state_dict())
    weight, *bias = (tensors[name].double() for name in adapter.output_tensors(unit))
    return Map(weight, bias[0] if bias else None)


def equations(prior: Map, adapter: ModelAdapter) -> Gram:
    """Empty equations for a map of this shape."""
    out, width = prior.weight.shape
    return Gram(width, out, bias=prior.bias is not None, device=adapter.device)


def as_tensors(adapter: ModelAdapter, unit: Unit, found: Map, state: LayerState) -> LayerState:
    """A map as named tensors of a layer, in the dtypes of `state`."""
    values = [found.weight] if found.bias is None else [found.weight, found.bias]
    names = adapter.output_tensors(unit)
    return {
        name: value.to(state[name]).contiguous() for name, value in zip(names, values, strict=True)
    }
