"""Wanda's product of norms, for whole channels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Wanda(SensitivityMetric):
    """L2 norm of the channel's inputs times L2 norm of its weights.

        S_j = sqrt( E_tokens[ x_j^2 ] ) * || W_:j ||_2

    Source: arXiv 2306.11695. Differs from the paper in scoring channels instead of single weights,
    so that the norm of the weights replaces |W_ij|, and in using the mean over tokens instead of
    the sum.
    """

    name = "wanda"
    paper = "2306.11695"
    source = "Wanda, Eq. 1, by channel"
    moments = ("square",)

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, in units of the map's output."""
        assert inputs.square_mean is not None
        return inputs.square_mean.sqrt() * inputs.weight.double().norm(dim=0).cpu()
