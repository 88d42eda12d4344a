"""Activations only."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Activation(SensitivityMetric):
    """Mean absolute input; the weights are ignored.

        S_j = E_tokens[ |x_j| ]

    Source: an ablation of arXiv 2510.15304.
    """

    name = "activation"
    paper = "2510.15304"
    source = "CoMe, ablation of the metric"
    moments = ("abs",)

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, in units of the map's input."""
        assert inputs.abs_mean is not None
        return inputs.abs_mean
