"""Prune&Comp: a drop, and the gap in magnitude that it leaves, scaled away."""

from __future__ import annotations

import torch
from torch import Tensor

from come.merge.operators.base import OPERATORS, Solution
from come.merge.operators.drop import Drop, kept_layer
from come.merge.span import Group, UnitAllocation
from come.stream.token_blocks import TokenBlocks


@OPERATORS.register
class PruneComp(Drop):
    """Drops a span a..b and rescales by the magnitude that it would have given.

        alpha = mean_tokens ||h_b|| / mean_tokens ||h_{a-1}||

    Source: arXiv 2507.18212. Differs from the paper in where the factor goes: there everything in
    front of the cut is multiplied by alpha, embeddings included; here the output maps behind it
    are divided by alpha. Norms ignore the scale of their input, so both give the same logits, up to
    the norms' epsilon, and this one leaves tied embeddings alone.
    """

    name = "prune_comp"
    paper = "2507.18212"
    source = "Prune&Comp, magnitude compensation"
    solves = True

    def solve(self, group: Group, split: UnitAllocation) -> Solution:
        """The factor 1 / alpha on all output maps behind the cut."""
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
        if keeper != 0:  # the kept layer lies behind the cut itself
            merged, adapter = group.merge(split), group.stream.adapter
            tensors = {name: merged[name] * scale for name in adapter.output_tensors()}
        return Solution(tensors, output_scale=scale)
