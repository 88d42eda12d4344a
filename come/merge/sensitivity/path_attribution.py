"""Integrated gradients of the loss along the channels' scales."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric


@SENSITIVITY.register
class PathAttribution(SensitivityMetric):
    """Loss attributed to a channel along a path from all channels off to all channels on.

        S_j = | integral_0^1 dL/ds_j at s = (a, .., a) da |     in 10 steps, midpoint rule

    s_j scales channel j of the input of an output projection; the scales of all layers change
    together. Costs ten forward and backward passes of the whole stream per merge.

    Source: arXiv 1703.01365 (integrated gradients), with channel scales as the inputs.
    """

    name = "path_attribution"
    paper = "1703.01365"
    source = "integrated gradients, on channel scales"
    gradient = "path"

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """S, [d_in] float64, >= 0, nats."""
        assert inputs.path is not None
        return inputs.path.abs()
