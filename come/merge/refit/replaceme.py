"""ReplaceMe: a linear map in place of dropped layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from come.linalg.equations import Map
from come.linalg.gram import Gram
from come.merge.combination import Combination
from come.merge.output_map import as_tensors, output_map
from come.merge.reconstruction import ReconstructionTargets, Target
from come.merge.refit.base import REFITS, Refit, check_drops, check_linear_output
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState
from come.models.layout import LayerLayout
from come.setting import setting


@REFITS.register
@dataclass(eq=False)
class ReplaceMe(Refit):
    """Folds a least-squares map for the dropped span a..b into the layer before it.

        T = argmin || M T - (M + h_b - h_{a-1}) ||^2,   W_down <- T^T W_down,   bias <- T^T bias

    M: [tokens, hidden], the MLP output of layer a - 1. T = I is the plain drop. Products are in
    float64. If M does not span all channels, T - I is the minimum-norm solution.

    Source: arXiv 2505.02819, the least-squares variant.
    """

    name = "replaceme"
    paper = "2505.02819"
    source = "ReplaceMe, least squares"

    target: Target = setting("current", "whose states are reconstructed", choices=("current",))

    def check(self, method: Combination) -> None:
        """Raises ValueError, also if there may be no layer before the dropped span."""
        super().check(method)
        check_drops(self, method)
        if not method.groups and method.protect_first < 1:
            raise ValueError(
                f"merge.refit={self.name} needs a layer before the dropped ones: set "
                "merge.protect_first=1 or more"
            )

    def check_layers(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises ValueError for layers whose last output is normed or gated."""
        super().check_layers(layouts)
        check_linear_output(f"merge.refit={self.name}", layouts)

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The kept layer's down projection with T folded in."""
        assert sources.kept_layer == 0
        stream, adapter = targets.stream, targets.stream.adapter
        sublayer = targets.layout.last
        linear = adapter.output_map(targets.first, sublayer)
        hidden = adapter.config.hidden_size
        sums = Gram(hidden, hidden, bias=False)
        outputs: list[Tensor] = []
        kept = stream.route(targets.first, targets.first)
        pairs = stream.pairs(targets.first + 1, targets.last + 1)
        with _outputs(linear, outputs):
            for _, (before, after) in zip(stream.through(targets.first, kept), pairs, strict=True):
                m = outputs.pop().reshape(-1, hidden).double()
                gap = after.flatten(0, 1).double() - before.flatten(0, 1).double()
                sums.add(m, gap, m.new_ones(len(m)))
        transform = torch.eye(hidden, dtype=torch.float64) + sums.minimum_norm().weight
        state = sources.state
        initial = output_map(state, sublayer)
        bias = None if initial.bias is None else transform @ initial.bias.double().cpu()
        solved = Map(transform @ initial.weight.double().cpu(), bias)
        return as_tensors(sublayer, solved, state)


@contextmanager
def _outputs(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Appends every output of `module` to `seen` while the context is open."""
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()
