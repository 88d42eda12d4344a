"""First-order Taylor expansion of the loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Taylor(SensitivityMetric):
    """First-order change of the loss if the channel's weights were zero, weight by weight.

        S_j = sum_i | W_ij dL/dW_ij |

    L is the mean loss over all calibration tokens. Costs one backward pass of the stream down to
    the span per merge.

    Source: arXiv 2305.11627 (LLM-Pruner), element-wise first order.
    """

    name = "taylor"
    paper = "2305.11627"
    source = "LLM-Pruner, first-order Taylor"
    gradient = "weight"

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, nats."""
        assert inputs.weight_gradient is not None
        product = inputs.weight.cpu().double() * inputs.weight_gradient.double()
        return product.abs().sum(dim=0, dtype=torch.float64)
