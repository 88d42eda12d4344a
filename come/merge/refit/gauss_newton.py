"""The FFN's input maps, solved for behind the output maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from come.merge.input_map import InputMap
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.refit.ridge import PARTS, Ridge
from come.merge.span import SourceLayers
from come.models.adapter import LayerState
from come.models.sublayers import run_attention


@REFITS.register
class GaussNewton(Refit):
    """Solves by ridge regression first, then each input map of the FFN by one Gauss-Newton step.

        W <- W + argmin_Z sum_t w_t | r_t - W_d (D_t * Z n_t) |^2 + mu mean_t |Z n_t|^2

    n: what W reads; D: slopes of the features in what W gives; r: what the layer's output lacks
    (see `come.merge.input_map`). Maps in the family's order, gate before up. In closed form for the
    up projection, in which features are linear, but for the truncation; no labels, no learning
    rate.

    Source: this project; truncated Gauss-Newton is textbook, of networks in Martens 2010.

    Args:
        refit_lambda: of the ridge regression.
        refit_parts: of the ridge regression; the FFN has to be one.
        align_lambda: of the ridge regression.
        input_lambda: penalty mu, relative to the mean curvature.
        steps: of conjugate gradients for each map, a pass of the FFN over all windows each.
    """

    name = "gauss_newton"
    paper = ""
    source = "ridge regression, then a Gauss-Newton step on the FFN's input maps"

    def __init__(
        self,
        refit_lambda: Any = 0.1,
        refit_parts: Sequence[str] = PARTS,
        align_lambda: float | None = None,
        input_lambda: float = 2.0,
        steps: int = 8,
    ) -> None:
        if "ffn" not in refit_parts:
            raise ValueError(
                f"merge.refit=gauss_newton solves for the FFN's input maps, and merge.refit_parts="
                f"{list(refit_parts)} leaves the FFN out: choose merge.refit=ridge"
            )
        if not input_lambda > 0 or steps < 1:
            raise ValueError(
                f"merge.options.input_lambda={input_lambda} must be above 0 and "
                f"steps={steps} at least 1"
            )
        self.ridge = Ridge(refit_lambda, refit_parts, align_lambda)
        self.ratio = input_lambda
        self.steps = steps

    @torch.no_grad()
    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """The output maps' new tensors, and the FFN's input maps."""
        stream, adapter = goals.stream, goals.stream.adapter
        found = self.ridge.solve(goals, pieces)
        layer = adapter.copy_layer(goals.first, {**pieces.state, **found})
        with stream.scratch_boundary("refit") as middles:
            for rows in stream.batches:
                states, _, _ = goals.input_output(rows)
                keywords = stream.keywords(len(states), goals.first)
                middles[rows] = run_attention(adapter, layer, states, keywords)[1]
            for name in adapter.architecture.ffn_inputs:
                problem = InputMap(goals, layer, middles, name)
                change = problem.step(self.ratio, self.steps)
                found[f"{name}.weight"] = problem.changed(change)
                layer.load_state_dict({**pieces.state, **found})
        return found

    @property
    def surrogate(self) -> Refit:
        """The ridge regression alone."""
        return self.ridge
