"""The whole layer, fitted by gradient steps: what the closed form leaves on the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.refit.ridge import PARTS, Ridge
from come.merge.span import SourceLayers
from come.models.adapter import LayerState


@REFITS.register
class Adam(Refit):
    """Solves by ridge regression first, then fits all tensors of the layer by Adam steps.

        loss = sum_t w_t | output_t - layer(x)_t |^2 / sum_t w_t | output_t |^2      of one batch

    with the learning rate falling to zero along a cosine; batches in turn, so nothing is random,
    but `calibration.batch_size` counts. The steps work on a float32 copy of the layer.
    An upper bound for the closed form rather than a training-free method.

    Source: arXiv 2609.02083 (XMERGE): a few hundred Adam steps that fit the surviving layer to the
    output of two. Differs in that it starts from the ridge solution.

    Args:
        refit_lambda: of the ridge regression.
        refit_parts: of the ridge regression.
        align_lambda: of the ridge regression.
        steps: Adam steps.
        learning_rate: of the first step.
    """

    name = "adam"
    batchwise = True
    paper = "2609.02083"
    source = "XMERGE, gradient steps on the surviving layer"

    def __init__(
        self,
        refit_lambda: Any = 0.1,
        refit_parts: Sequence[str] = PARTS,
        align_lambda: float | None = None,
        steps: int = 300,
        learning_rate: float = 1e-4,
    ) -> None:
        if steps < 1 or learning_rate <= 0:
            raise ValueError(
                f"merge.options.steps={steps} must be at least 1 and "
                f"learning_rate={learning_rate} above 0"
            )
        self.ridge = Ridge(refit_lambda, refit_parts, align_lambda)
        self.steps = steps
        self.learning_rate = learning_rate

    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """All tensors of the layer, fitted."""
        stream, index, state = goals.stream, goals.first, pieces.state
        start = {**state, **self.ridge.solve(goals, pieces)}
        layer = stream.adapter.copy_layer(index, start).float().requires_grad_(True)
        optimizer = torch.optim.Adam(layer.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        steps = tqdm(range(self.steps), desc="adam", leave=False, delay=2, disable=stream.quiet)
        with torch.enable_grad():
            for step in steps:
                rows = stream.batches[step % len(stream.batches)]
                states, wanted, weights = goals.input_output(rows)
                keywords = as_float(stream.keywords(len(states), index))
                output = layer(states.float(), **keywords)
                gap = (wanted.float() - output).flatten(0, 1)
                size = wanted.float().flatten(0, 1)
                loss = (weights * gap.square().sum(dim=1)).sum()
                loss = loss / (weights * size.square().sum(dim=1)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        found = layer.state_dict()
        return {name: found[name].detach().to(tensor.dtype) for name, tensor in state.items()}

    @property
    def surrogate(self) -> Refit:
        """The ridge regression alone."""
        return self.ridge


def as_float(value: Any) -> Any:
    """The same keyword arguments with floating-point tensors (masks, rotary tables) in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: as_float(item) for key, item in value.items()}
    return tuple(map(as_float, value)) if isinstance(value, tuple) else value
