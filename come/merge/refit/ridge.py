"""Ridge regression of the output projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from come.linalg.equations import Equations, Map
from come.linalg.gram import Gram, best_lambda
from come.merge.alignment import (
    aligns,
    fold_by_layer,
    fold_input_transform,
    input_maps,
    input_tensors,
)
from come.merge.combination import Combination
from come.merge.inside_layer import InsideLayer
from come.merge.normed_output import solve_normed_output
from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS, Refit
from come.merge.source_layers import SourceLayers
from come.merge.work import SpanSize, Work
from come.models.layer_state import LayerState
from come.models.layout import SUBLAYERS, Sublayer
from come.setting import setting

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 5  # with lambda "auto", every fifth window is held out


@REFITS.register
@dataclass(eq=False)
class Ridge(Refit):
    """Solves for the layer's output projections, sublayer by sublayer.

        W_s = argmin sum_t w_t | (target_s - h_s) - W f_s |^2 + mu |W - W_s0|^2
        mu  = lambda * mean diagonal of sum_t w_t f_s f_s^T

    h_s: the residual stream before sublayer s, with the solutions of the sublayers before it; f_s:
    the input of its output projection, the head outputs of attention or the hidden activations of
    an MLP; target_s: the target after it (see `come.merge.reconstruction`). W_s0 is the projection
    of the merged layer before the refit. Output biases are solved together with their projections.
    If layers multiply the residual stream, a drop's kept layer first gets the scale of the span.
    With `align`, the input projections of each sublayer are aligned first (see
    `come.merge.alignment`). Where a norm follows the projection, see `come.merge.normed_output`;
    where a gate multiplies its channels, each channel would need a Gram matrix of its own, and the
    projection stays as it is. In a trial merge, unit selection may already have solved for all W_s
    (`sources.solved`), with the mean diagonal over all units in mu; that solution is used, unless a
    norm or such a gate follows, or the layer has experts, whose features depend on which others are
    kept.

    Source: this project; the closed form is that of arXiv 2505.02819 and 2602.08858, which solve
    for the MLP's projection only.
    """

    name = "ridge"
    paper = ""
    source = "ridge regression to the span's output"

    lambda_: Any = setting(
        0.1,
        "penalty on the change, relative to the mean diagonal of the Gram matrix",
        above=0,
        words=("auto",),
    )
    sublayers: list[str] = setting(
        ["attention", "ffn"], "whose output maps are refitted", choices=SUBLAYERS
    )
    align: float | None = setting(
        None,
        "penalty of the alignment of input maps; null for none",
        kind=float,
        above=0,
        optional=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sublayers:
            raise ValueError("merge.refit.sublayers=[]: at least one of attention, ffn")

    def check(self, method: Combination) -> None:
        """Raises ValueError, also for alignment without folded norms."""
        super().check(method)
        if self.align is not None and method.norms != "fold":
            raise ValueError(
                f"merge.refit.align={self.align} fits rows that carry their own norm scale, and "
                f"merge.norms={method.norms} averages the scales; choose merge.norms=fold, or "
                "merge.refit.align=null"
            )

    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The new tensors of the output projections, and of the input projections if aligned."""
        adapter, index, state = targets.stream.adapter, targets.place, sources.state
        changed = any(each.post_norm or each.channel_gate for each in targets.layout)
        differs = targets.layout.routed or changed
        if self._same_as_selection and sources.solved and not differs:
            return _selection_solution(targets, sources)
        layer, layout = adapter.copy_layer(index, state), targets.layout
        found: dict[str, Tensor] = {}
        scale = state[layout.scale].item() if layout.scale else targets.scale.whole
        if scale != targets.scale.whole:  # that of the layer that a drop keeps
            found = targets.scale.tensors(adapter, index, state, index - targets.first)
            adapter.assign(layer, found)
        for sublayer in layout:
            if sublayer.kind not in self.sublayers or sublayer.channel_gate:
                continue
            if self.align is not None and aligns(sublayer):
                found |= self._aligned(targets, sources, layer, sublayer)
                adapter.assign(layer, found)
            if sublayer.post_norm:
                found |= self._normed(targets, sources, layer, sublayer)
                adapter.assign(layer, found)
                continue
            inside = InsideLayer(targets, layer, sublayer)
            initial = output_map(layer.state_dict(), sublayer)
            (out, width), bias = initial.weight.shape, initial.bias is not None
            fit: Equations
            held_out: Gram | None = None
            if isinstance(self.lambda_, str):
                fit, held_out = (
                    Gram(width, out, bias=bias, device=adapter.device) for _ in range(2)
                )
            else:
                fit = equations(width, targets.stream, bias=bias)
            for batch in targets:
                read, before = inside.streams(batch)
                features = inside.features(batch, read)
                target = batch.missing(sublayer, before)
                weights = batch.weights.view(target.shape[:2])
                if held_out is None:
                    fit.add(features.flatten(0, 1), target.flatten(0, 1), weights.flatten())
                    continue
                is_held_out = batch.windows % HELD_OUT == HELD_OUT - 1
                for sums, chosen in ((fit, ~is_held_out), (held_out, is_held_out)):
                    sums.add(
                        features[chosen].flatten(0, 1),
                        target[chosen].flatten(0, 1),
                        weights[chosen].flatten(),
                    )
            fit.all_reduce(targets.stream.processes)
            if held_out is not None:
                held_out.all_reduce(targets.stream.processes)
            solved = self._solve(fit, held_out, initial)
            found |= as_tensors(sublayer, solved, dict(layer.named_parameters()))
            adapter.assign(layer, found)
        return found

    def work(self, size: SpanSize) -> Work:
        """Both least-squares problems, the forward passes for their inputs, and the alignment."""
        heads = size.sums(size.heads, size.hidden) + size.solve(size.heads, size.hidden)
        ffn = size.sums(size.channels, size.hidden) + size.solve(size.channels, size.hidden)
        reads = size.passes * (size.layers + 1.5)
        copies = Work(bytes=2 * size.layer_bytes + ffn.bytes)
        aligned = Work() if self.align is None else size.aligned() + size.folded()
        return heads + ffn + reads + copies + aligned

    def trial_work(self, size: SpanSize, solved: bool) -> Work:
        """The work of the alignment, and of the solve unless unit selection has the solution."""
        if solved and self._same_as_selection:
            copies = Work(bytes=2 * size.layer_bytes)
            return copies if self.align is None else size.aligned() + size.folded() + copies
        return super().trial_work(size, solved)

    @property
    def _same_as_selection(self) -> bool:
        """Whether unit selection solves the same problem."""
        return len(set(self.sublayers)) == len(SUBLAYERS) and self.lambda_ != "auto"

    @property
    def surrogate(self) -> Ridge:
        """The ridge regression alone, without what a subclass adds to it."""
        if type(self) is Ridge:
            return self
        return Ridge(
            target=self.target,
            weights=self.weights,
            lambda_=self.lambda_,
            sublayers=self.sublayers,
            align=self.align,
        )

    def _normed(
        self,
        targets: ReconstructionTargets,
        sources: SourceLayers,
        layer: nn.Module,
        sublayer: Sublayer,
    ) -> LayerState:
        """The output projection of a sublayer with a norm after it, and that norm's scale."""
        ratio = 0.1 if isinstance(self.lambda_, str) else self.lambda_
        kept = sources.kept.get(sublayer.unit)
        columns = [len(units) * sublayer.columns for units in kept] if kept else None
        return solve_normed_output(targets, layer, sublayer, ratio, columns)

    def _aligned(
        self,
        targets: ReconstructionTargets,
        sources: SourceLayers,
        layer: nn.Module,
        sublayer: Sublayer,
    ) -> LayerState:
        """The aligned input projections of a sublayer; each layer's rows use its own map."""
        adapter, index = targets.stream.adapter, targets.place
        assert self.align is not None
        assert sublayer.norm is not None
        norms = [adapter.copy_norm(index, sublayer, state) for state in sources.layers]
        own = layer.get_submodule(sublayer.norm.module)
        inside = InsideLayer(targets, layer, sublayer)
        maps = input_maps(
            targets, sublayer, own, norms, lambda batch: inside.streams(batch)[0], self.align
        )
        roles = adapter.roles(index)
        if sublayer.unit in sources.kept:
            state = dict(layer.named_parameters())
            return fold_by_layer(roles, sublayer, sources.kept[sublayer.unit], state, maps)
        folded = [  # the operator mixes rows of several layers
            fold_input_transform(roles, sublayer, state, change)
            for state, change in zip(sources.layers, maps, strict=True)
        ]
        joined = sources.join(folded)
        return {name: joined[name] for name in input_tensors(roles, sublayer)}

    def _solve(self, fit: Equations, held_out: Gram | None, initial: Map) -> Map:
        if held_out is None:
            return fit.solve(initial, self.lambda_ * fit.mean_diagonal(), consume=True)
        assert isinstance(fit, Gram)
        both = fit + held_out
        ratio = best_lambda(fit, held_out, initial, GRID) if held_out.yty else 0.1
        return both.solve(initial, ratio * both.mean_diagonal(), consume=True)


def _selection_solution(targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
    """The tensors of unit selection's solution."""
    state, found = sources.state, dict[str, Tensor]()
    roles = targets.stream.adapter.roles(targets.place)
    for sublayer in targets.layout:
        solved = sources.solved[sublayer.unit]
        if solved.inputs:
            kept = sources.kept[sublayer.unit]
            found |= fold_by_layer(roles, sublayer, kept, state, solved.inputs)
        found |= as_tensors(sublayer, solved.output, state)
    return found
