"""Gradient-based refit of the whole layer: an upper bound for the closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import REFITS
from come.merge.refit.ridge import Ridge
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState, overlay
from come.models.sublayers import run_layer
from come.progress import ProgressBar
from come.setting import setting


@REFITS.register
@dataclass(eq=False)
class Adam(Ridge):
    """Solves by ridge regression first, then fits all tensors of the layer by Adam steps.

        loss = sum_t w_t | output_t - layer(x)_t |^2 / sum_t w_t | output_t |^2      of one batch

    The learning rate decays to zero along a cosine. Batches are used in turn, so nothing is random,
    but the result depends on `calibration.batch_size`. The steps update a float32 copy of the
    layer. This is an upper bound for the closed form rather than a training-free method.

    Source: arXiv 2609.02083 (XMERGE): a few hundred Adam steps that fit the surviving layer to the
    output of two. Differs from the paper in starting from the ridge solution.
    """

    name = "adam"
    batchwise = True
    paper = "2609.02083"
    source = "XMERGE, gradient steps on the surviving layer"

    steps: int = setting(300, "Adam steps", least=1)
    learning_rate: float = setting(1e-4, "of the first step", above=0)

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """All tensors of the layer, fitted."""
        stream, index, state = targets.stream, targets.place, sources.state
        start = overlay(state, super().solve(targets, sources))
        own = {name: tensor.float().clone() for name, tensor in start.items()}
        layer = stream.adapter.copy_layer(index, own).requires_grad_(True)
        optimizer = torch.optim.Adam(layer.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        steps = ProgressBar(range(self.steps), desc="adam", shown=stream.progress)
        with torch.enable_grad():
            for step in steps:
                batch = TargetBatch(targets, step % len(stream.batches))
                keywords = as_float(stream.keywords(len(batch.states), index))
                output = run_layer(layer, batch.states.float(), keywords)
                gap = (batch.output.float() - output).flatten(0, 1)
                size, weights = batch.output.float().flatten(0, 1), batch.weights
                loss = (weights * gap.square().sum(dim=1)).sum()
                loss = loss / (weights * size.square().sum(dim=1)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        found = layer.state_dict()
        return {name: found[name].detach().to(tensor.dtype) for name, tensor in start.items()}


def as_float(value: Any) -> Any:
    """The keyword arguments with floating-point tensors (masks, rotary tables) in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: as_float(item) for key, item in value.items()}
    return tuple(map(as_float, value)) if isinstance(value, tuple) else value
