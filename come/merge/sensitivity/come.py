"""CoMe's channel sensitivity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Come(SensitivityMetric):
    """Expected L1 change of the map's output when a channel is dropped.

        S_j = E_tokens[ |x_j| ] * sum_i |W_ij|

    Source: arXiv 2510.15304, Eq. 1.
    """

    name = "come"
    paper = "2510.15304"
    source = "CoMe, Eq. 1"
    moments = ("abs",)

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, in units of the map's output."""
        assert inputs.abs_mean is not None
        return inputs.abs_mean * inputs.weight.abs().sum(dim=0, dtype=torch.float64).cpu()
