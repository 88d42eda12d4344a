"""Prune&Comp: layer dropping with magnitude compensation."""

from __future__ import annotations

import torch
from torch import Tensor

from come.merge.operators.base import OPERATORS, Solution
from come.merge.operators.drop import Drop, kept_layer
from come.merge.span import Group, UnitAllocation
from come.stream.token_blocks import TokenBlocks


@OPERATORS.register
class PruneComp(Drop):
    """Drops a span a..b and compensates for the magnitude that it would have added.

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
    solves = True

    def solve(self, group: Group, split: UnitAllocation) -> Solution:
        """The factor 1 / alpha on all output projections after the cut."""
        keeper = kept_layer(split.shares)
        before, after = (
            (group.first + 1, group.last + 1) if keeper == 0 else (group.first, group.last)
        )
        sums = torch.zeros(2, dtype=torch.float64)

        def accumulate(*norms: Tensor) -> None:
            for i, norm in enumerate(norms):
                sums[i] += norm.sum().cpu()

        blocks = TokenBlocks(accumulate)
        for pair in group.stream.pairs(before, after):
            blocks.add(*(states.flatten(0, 1).double().norm(dim=-1) for states in pair))
        blocks.finish()
        scale = (sums[0] / sums[1]).item()
        tensors = {}
        if keeper != 0:  # the kept layer itself comes after the cut
            merged, adapter = group.merge(split), group.stream.adapter
            tensors = {name: merged[name] * scale for name in adapter.output_tensors()}
        return Solution(tensors, output_scale=scale)
