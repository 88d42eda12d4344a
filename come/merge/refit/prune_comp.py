"""Prune&Comp: magnitude compensation for dropped layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from come.merge.combination import Combination
from come.merge.reconstruction import ReconstructionTargets, Target
from come.merge.refit.base import REFITS, Refit, check_drops
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState
from come.setting import setting
from come.stream.token_blocks import TokenBlocks


@REFITS.register
@dataclass(eq=False)
class PruneComp(Refit):
    """Compensates for the magnitude that the dropped span a..b would have added.

        alpha = mean_tokens ||h_b|| / mean_tokens ||h_{a-1}||

    Source: arXiv 2507.18212. Differs from the paper in where the factor is applied: the paper
    multiplies everything before the cut by alpha, embeddings included; here the output projections
    after the cut are divided by alpha. Norms are invariant to the scale of their input, so both
    give the same logits up to the norms' epsilon, and this variant leaves tied embeddings
    unchanged.
    """

    name = "prune_comp"
    paper = "2507.18212"
    source = "Prune&Comp, magnitude compensation"

    target: Target = setting("current", "whose states are compared", choices=("current",))

    def check(self, method: Combination) -> None:
        """Raises ValueError for components that would read the model without the factor."""
        super().check(method)
        check_drops(self, method)
        if self.downstream is not None:
            raise ValueError(
                f"merge.refit.downstream={self.downstream} fits states that merge.refit="
                f"{self.name} scales; leave one of them out"
            )
        trying = next(
            (
                f"merge.{key}={part.name}"
                for key, part, tries in (
                    ("schedule", method.schedule, method.schedule.trials),
                    ("selection", method.selection, method.selection.num_trials),
                )
                if tries
            ),
            None,
        )
        if trying:
            raise ValueError(
                f"{trying} merges on trial without the factor of merge.refit={self.name}: choose "
                "another, such as merge.schedule=block merge.selection=angular"
            )

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The scaled output projections of the kept layer, if it comes after the cut."""
        if sources.kept_layer == 0:
            return {}
        scale, state = self.output_scale(targets, sources), sources.state
        return targets.stream.adapter.scaled_outputs(targets.place, state, scale)

    def output_scale(self, targets: ReconstructionTargets, sources: SourceLayers) -> float:
        """1 / alpha."""
        first, last = targets.first, targets.last
        before, after = (first + 1, last + 1) if sources.kept_layer == 0 else (first, last)
        sums = torch.zeros(2, dtype=torch.float64)

        def accumulate(*norms: Tensor) -> None:
            for i, norm in enumerate(norms):
                sums[i] += norm.sum().cpu()

        blocks = TokenBlocks(accumulate)
        for pair in targets.stream.pairs(before, after):
            blocks.add(*(states.flatten(0, 1).double().norm(dim=-1) for states in pair))
        blocks.finish()
        return (sums[0] / sums[1]).item()
