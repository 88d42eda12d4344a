"""Layers that multiply the residual stream: y_i = c_i (x_i + s_i), s_i the sum of sublayers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from come.models.adapter import ModelAdapter
from come.models.layer_state import LayerState


@dataclass(frozen=True)
class SpanScale:
    """The scales of layers a..b in the layer that replaces them.

        h_b = c (h_{a-1} + sum_i f_i s_i),   c = c_a ... c_b,   f_i = 1 / (c_a ... c_{i-1})

    Attributes:
        whole: c, rounded to the dtype in which a layer stores its scale.
        factors: f_i of every layer.
    """

    whole: float
    factors: list[float]

    @classmethod
    def of(cls, adapter: ModelAdapter, layers: Sequence[int]) -> SpanScale:
        """The scales of ascending layers; layers between them count, but have no factor."""
        found = [adapter.scale(index) for index in range(layers[0], layers[-1] + 1)]
        scales = [1.0 if scale is None else scale.item() for scale in found]
        product, dtype = math.prod(scales), None if found[0] is None else found[0].dtype
        whole = torch.tensor(product, dtype=dtype or torch.float64).item()
        return cls(whole, [1 / math.prod(scales[: index - layers[0]]) for index in layers])

    def tensors(
        self, adapter: ModelAdapter, index: int, state: LayerState, number: int
    ) -> dict[str, Tensor]:
        """The tensors with which a layer of the span adds f_i s_i, and multiplies by c.

        Args:
            adapter: the model.
            index: the layer.
            state: its tensors.
            number: its number in the span, i.

        Returns:
            Its scale, and its output projections or the norms after them; nothing without a scale.
        """
        name = adapter.layer_layout(index).scale
        if not name:
            return {}
        outputs = adapter.scaled_outputs(index, state, self.factors[number])
        return {**outputs, name: torch.full_like(state[name], self.whole)}
