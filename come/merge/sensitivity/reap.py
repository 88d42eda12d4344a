"""REAP's score of experts: how much they add where they are routed to."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class Reap(SensitivityMetric):
    """Mean norm of a unit's weighted output, over the tokens that are routed to it.

        S_u = E_{tokens of u}[ g_u || E_u(x) ||_2 ]

    g_u: routing weight as the model applies it, after it is normalised over the picked experts if
    the model does so; E_u: output of expert u. For KV groups and channels, which see all tokens and
    have no routing weight, it is the mean norm of what they add to the output.

    Source: arXiv 2510.13999 (REAP), for routed experts.
    """

    name = "reap"
    paper = "2510.13999"
    source = "REAP, router-weighted expert activation"
    moments = ("output_norm",)

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S of the unit of each column, [d_in] float64, >= 0, in units of the map's output."""
        assert inputs.output_norm is not None
        columns = inputs.weight.shape[1] // len(inputs.output_norm)
        return inputs.output_norm.repeat_interleave(columns)
