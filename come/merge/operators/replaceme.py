"""ReplaceMe: layer dropping with a linear map in place of the dropped span."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from come.merge.combination import Combination
from come.merge.operators.base import OPERATORS, Solution
from come.merge.operators.drop import Drop, kept_layer
from come.merge.span import Group, UnitAllocation


@OPERATORS.register
class ReplaceMe(Drop):
    """Drops a span a..b and folds a least-squares map into the layer before it.

        T = argmin || M T - (M + h_b - h_{a-1}) ||^2,   W_down <- T^T W_down,   bias <- T^T bias

    M: [tokens, hidden], the MLP output of layer a - 1. T = I is the plain drop. Both products
    accumulate batch by batch in float64. If M does not span all channels, T - I is the minimum-norm
    solution.

    Source: arXiv 2505.02819, the least-squares variant.
    """

    name = "replaceme"
    paper = "2505.02819"
    source = "ReplaceMe, least squares"
    solves = True

    def check(self, method: Combination) -> None:
        """Raises ValueError, also if there may be no layer before the dropped span."""
        super().check(method)
        if not method.groups and method.protect_first < 1:
            raise ValueError(
                f"merge.operator={self.name} needs a layer before the dropped ones: set "
                "merge.protect_first=1 or more"
            )

    def solve(self, group: Group, split: UnitAllocation) -> Solution:
        """The kept layer's down projection with T folded in."""
        assert kept_layer(split.shares) == 0
        stream, adapter = group.stream, group.stream.adapter
        linear = adapter.output_map(group.first, "channel")
        hidden = linear.out_features
        gram = torch.zeros(hidden, hidden, dtype=torch.float64)
        moment = torch.zeros(hidden, hidden, dtype=torch.float64)
        outputs: list[Tensor] = []
        keeper = stream.route(group.first, group.first)
        targets = stream.pairs(group.first + 1, group.last + 1)
        with _outputs(linear, outputs):
            for _, (before, after) in zip(
                stream.through(group.first, keeper), targets, strict=True
            ):
                m = outputs.pop().reshape(-1, hidden).double()
                gap = after.flatten(0, 1).double() - before.flatten(0, 1).double()
                gram += (m.T @ m).cpu()
                moment += (m.T @ gap).cpu()
        change = torch.linalg.lstsq(gram, moment, driver="gelsd").solution
        transform = (torch.eye(hidden, dtype=torch.float64) + change).T
        merged = group.merge(split)
        return Solution(
            {
                name: (transform @ merged[name].double().cpu()).to(merged[name])
                for name in adapter.output_tensors("channel")
            }
        )


@contextmanager
def _outputs(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Appends every output of `module` to `seen` while the context is open."""
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()
