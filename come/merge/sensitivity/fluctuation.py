"""FLAP's fluctuation: how much a channel deviates from its mean."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Fluctuation(SensitivityMetric):
    """Variance of the channel's input times the squared norm of its weights.

        S_j = Var_tokens[ x_j ] * || W_:j ||_2^2

    A channel that hardly varies could be replaced by a constant.

    Source: arXiv 2312.11983 (FLAP), weighted input feature variance.
    """

    name = "fluctuation"
    paper = "2312.11983"
    source = "FLAP, weighted input feature variance"
    moments = ("square", "mean")

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, in squared units of the map's output."""
        assert inputs.square_mean is not None
        assert inputs.mean is not None
        variance = (inputs.square_mean - inputs.mean.square()).clamp_min(0)
        return variance * inputs.weight.double().square().sum(dim=0).cpu()
