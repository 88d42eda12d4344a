"""Random channel scores, a control for the other metrics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.sensitivity.base import SENSITIVITY, MapStatistics, SensitivityMetric
from come.setting import setting


@SENSITIVITY.register
@dataclass(eq=False)
class Random(SensitivityMetric):
    """Uniform scores in [0, 1), determined by the seed and the map alone."""

    name = "random"
    paper = ""
    source = "control"

    seed: int = setting(0, "seeds every map together with its name")

    def score(self, inputs: MapStatistics) -> Float[Tensor, " in"]:
        """Scores, [d_in] float64, uniform in [0, 1)."""
        digest = hashlib.sha256(f"{self.seed}/{inputs.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(inputs.weight.shape[1], generator=generator, dtype=torch.float64)
