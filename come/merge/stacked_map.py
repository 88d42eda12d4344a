"""The output projections of a span side by side."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from come.linalg.equations import Map
from come.merge.normed_output import scale_of
from come.merge.reconstruction import ReconstructionTargets
from come.models.layout import Sublayer


class StackedMap:
    """The output projections of a span side by side, W = [W_1 ... W_m]; biases are summed.

    Where a norm follows them, each is multiplied by the norm's scale. If layers multiply the
    residual stream, each is multiplied by its layer's factor (see `come.merge.scales`).

    W is not stored: it is read layer by layer and is column-major, which is the layout
    of the dual form.

    Args:
        targets: reconstruction targets of the span.
        sublayer: the sublayer whose projections they are.
    """

    def __init__(self, targets: ReconstructionTargets, sublayer: Sublayer) -> None:
        self._targets = targets
        self._sublayer = sublayer

    def read(self) -> Map:
        """W of all columns."""
        return self.columns(None)

    def columns(self, chosen: Int[Tensor, " kept"] | None) -> Map:
        """W of the chosen columns, ascending; None for all."""
        targets, bias = self._targets, self._sublayer.bias
        layers = range(targets.first, targets.last + 1)
        weight: Tensor | None = None
        total: Tensor | None = None
        filled = 0
        for number, (index, factor) in enumerate(zip(layers, targets.scale.factors, strict=True)):
            state = targets.stream.adapter.layer_state(index)
            rows = self._sublayer.output_weight(state).T
            if self._sublayer.post_norm:
                rows = rows * (factor * scale_of(state, self._sublayer)).to(rows)
            elif factor != 1:
                rows = rows * factor
            width = len(rows)
            if weight is None:
                size = len(layers) * width if chosen is None else len(chosen)
                weight = rows.new_empty(size, rows.shape[1])
            if chosen is not None:
                own = chosen[chosen // width == number] - number * width
                rows = rows[own.to(rows.device)]
            weight[filled : filled + len(rows)] = rows
            filled += len(rows)
            if bias in state:
                added = factor * state[bias].double()
                total = added if total is None else total + added
        assert weight is not None
        return Map(weight.T, total)
