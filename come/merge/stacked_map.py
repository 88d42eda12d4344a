"""The output projections of a span side by side."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from come.linalg.equations import Map
from come.merge.reconstruction import ReconstructionTargets
from come.models.adapter import Unit


class StackedMap:
    """The output projections of a span side by side, W = [W_1 ... W_m]; biases are summed.

    W is not stored: it is read layer by layer and is column-major, which is the layout
    of the dual form.

    Args:
        targets: reconstruction targets of the span.
        unit: the units whose outputs the projections read.
    """

    def __init__(self, targets: ReconstructionTargets, unit: Unit) -> None:
        self._targets = targets
        self._names = targets.stream.adapter.output_tensors(unit)

    def read(self) -> Map:
        """W of all columns."""
        return self.columns(None)

    def columns(self, chosen: Int[Tensor, " kept"] | None) -> Map:
        """W of the chosen columns, ascending; None for all."""
        targets, (name, *bias) = self._targets, self._names
        layers = range(targets.first, targets.last + 1)
        weight: Tensor | None = None
        total: Tensor | None = None
        filled = 0
        for number, index in enumerate(layers):
            state = targets.stream.adapter.layer_state(index)
            rows = state[name].T
            width = len(rows)
            if weight is None:
                size = len(layers) * width if chosen is None else len(chosen)
                weight = rows.new_empty(size, rows.shape[1])
            if chosen is not None:
                own = chosen[chosen // width == number] - number * width
                rows = rows[own.to(rows.device)]
            weight[filled : filled + len(rows)] = rows
            filled += len(rows)
            if bias:
                added = state[bias[0]].double()
                total = added if total is None else total + added
        assert weight is not None
        return Map(weight.T, total)
