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
from come.merge.normed_output import ROUNDS, OutputNorm, best_scale, stored_scale
from come.merge.output_map import as_tensors, output_map
from come.merge.reconstruction import ReconstructionTargets, Target
from come.merge.refit.base import REFITS, Refit, check_drops, check_linear_output
from come.merge.source_layers import SourceLayers
from come.models.layer_state import LayerState
from come.models.layout import LayerLayout
from come.setting import setting
from come.stream.processes import SINGLE


@REFITS.register
@dataclass(eq=False)
class ReplaceMe(Refit):
    """Folds a least-squares map for the dropped span a..b into the layer before it.

        T = argmin || M T - (M + h_b - h_{a-1}) ||^2,   W_down <- T^T W_down,   bias <- T^T bias

    M: [tokens, hidden], the MLP output of layer a - 1. T = I is the plain drop. Products are in
    float64. If M does not span all channels, T - I is the minimum-norm solution.

    Source: arXiv 2505.02819, the least-squares variant. Differs from the paper where a norm follows
    the down projection: a map after a norm cannot be folded, so T maps what the norm reads, in two
    rounds as in `come.merge.normed_output`, and the norm's scale is fitted.
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
        """Raises ValueError for layers whose last output is gated or scaled."""
        super().check_layers(layouts)
        check_linear_output(f"merge.refit={self.name}", layouts, norms=True)

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The kept layer's down projection with T folded in, and the scale of a norm after it."""
        assert sources.kept_layer == 0
        outputs, sublayer, state = _Outputs(targets), targets.layout.last, sources.state
        scale: LayerState = {}
        if sublayer.post_norm is None:
            transform = outputs.transform()
        else:
            norm = OutputNorm(targets.stream.adapter.layer(targets.first), sublayer)
            transform = outputs.transform_before(norm)
            scale = stored_scale(best_scale(outputs, norm, transform), sublayer, state)
        initial = output_map(state, sublayer)
        bias = None if initial.bias is None else transform @ initial.bias.double().cpu()
        solved = Map(transform @ initial.weight.double().cpu(), bias)
        return {**as_tensors(sublayer, solved, state), **scale}


class _Outputs:
    """What the down projection of the layer before a dropped span returns, and what is missing.

    Batches are (m_t, y_t + (h_b - h_{a-1})_t, weights 1), in float64: m_t the outputs of the
    projection, y_t what the layer adds for them, the same unless a norm follows.
    """

    processes = SINGLE  # each process reads all windows

    def __init__(self, targets: ReconstructionTargets) -> None:
        self._targets = targets
        self._hidden = targets.stream.adapter.config.hidden_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        targets, stream, sublayer = self._targets, self._targets.stream, self._targets.layout.last
        projection = stream.adapter.output_map(targets.first, sublayer)
        layer, norm = stream.adapter.layer(targets.first), sublayer.post_norm
        seen: list[Tensor] = []
        kept = stream.route(targets.first, targets.first)
        pairs = stream.pairs(targets.first + 1, targets.last + 1)
        with _outputs(projection, seen):
            for _, (before, after) in zip(stream.through(targets.first, kept), pairs, strict=True):
                m = seen.pop()
                added = m if norm is None else layer.get_submodule(norm.module)(m)
                gap = after.double() - before.double()
                missing = (added.double().view_as(gap) + gap).flatten(0, 1)
                yield m.reshape(-1, self._hidden).double(), missing, gap.new_ones(len(missing))

    def transform(self) -> Tensor:
        """T^T."""
        sums = Gram(self._hidden, self._hidden, bias=False)
        for m, missing, weights in self:
            sums.add(m, missing - m, weights)
        return torch.eye(self._hidden, dtype=torch.float64) + sums.minimum_norm().weight

    def transform_before(self, norm: OutputNorm) -> Tensor:
        """T^T for the map g * RMSNorm(T^T m_t), with the scale g as it is."""
        scale = norm.scale.double()[:, None].cpu()
        transform = torch.eye(self._hidden, dtype=torch.float64)
        for _ in range(ROUNDS):
            sums, start = Gram(self._hidden, self._hidden, bias=False), scale * transform
            for m, missing, weights in self:
                rows = m * norm.inverse_rms(m @ transform.T.to(m))
                sums.add(rows, missing - rows @ start.T.to(rows), weights)
            transform = (start + sums.minimum_norm().weight.cpu()) / norm.divisor[:, None].cpu()
        return transform


@contextmanager
def _outputs(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Appends every output of `module` to `seen` while the context is open."""
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()
