"""Weights only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Magnitude(SensitivityMetric):
    """L1 norm of the channel's weights; the inputs are ignored.

        S_j = sum_i |W_ij|

    Source: an ablation of arXiv 2510.15304.
    """

    name = "magnitude"
    paper = "2510.15304"
    source = "CoMe, ablation of the metric"

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0."""
        return inputs.weight.abs().sum(dim=0, dtype=torch.float64).cpu()
