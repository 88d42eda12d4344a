"""The FFN's input maps, solved for behind the output maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from come.merge.input_map import InputMap
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.refit.ridge import Ridge
from come.merge.source_layers import SourceLayers
from come.models.adapter import LayerState
from come.models.sublayers import run_attention
from come.setting import setting


@REFITS.register
@dataclass(eq=False)
class GaussNewton(Ridge):
    """Solves by ridge regression first, then each input map of the FFN by one Gauss-Newton step.

        W <- W + argmin_Z sum_t w_t | r_t - W_d (D_t * Z n_t) |^2 + mu mean_t |Z n_t|^2

    n: what W reads; D: slopes of the features in what W gives; r: what the layer's output lacks
    (see `come.merge.input_map`). Maps in the family's order, gate before up. In closed form for the
    up projection, in which features are linear, but for the truncation; no labels, no learning
    rate.

    Source: this project; truncated Gauss-Newton is textbook, of networks in Martens 2010.
    """

    name = "gauss_newton"
    paper = ""
    source = "ridge regression, then a Gauss-Newton step on the FFN's input maps"

    align: float | None = setting(
        0.01,
        "penalty of the alignment of input maps; null for none",
        kind=float,
        above=0,
        optional=True,
    )
    input_lambda: float = setting(
        2.0, "penalty of the step on input maps, relative to the mean curvature", above=0
    )
    steps: int = setting(8, "steps of conjugate gradients for each input map", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "ffn" not in self.sublayers:
            raise ValueError(
                "merge.refit=gauss_newton solves for the input maps of the FFN, and "
                f"merge.refit.sublayers={list(self.sublayers)} leaves the FFN out: choose "
                "merge.refit=ridge"
            )

    @torch.no_grad()
    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """The output maps' new tensors, and the FFN's input maps."""
        stream, adapter = goals.stream, goals.stream.adapter
        found = super().solve(goals, pieces)
        layer = adapter.copy_layer(goals.first, {**pieces.state, **found})
        with stream.scratch_boundary("refit") as middles:
            for rows in stream.batches:
                states, _, _ = goals.input_output(rows)
                keywords = stream.keywords(len(states), goals.first)
                middles[rows] = run_attention(adapter, layer, states, keywords)[1]
            for name in adapter.architecture.ffn_inputs:
                problem = InputMap(goals, layer, middles, name)
                change = problem.step(self.input_lambda, self.steps)
                found[f"{name}.weight"] = problem.changed(change)
                layer.load_state_dict({**pieces.state, **found})
        return found

    @property
    def surrogate(self) -> Refit:
        """The ridge regression alone."""
        return self.plain()
