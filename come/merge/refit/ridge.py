"""Ridge regression of the output projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from come.linalg.equations import Equations, Map
from come.linalg.gram import Gram, best_lambda
from come.merge.alignment import (
    fold_input_transform,
    input_maps,
    input_tensors,
    transformed,
)
from come.merge.combination import Combination
from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import REFITS, Refit
from come.merge.source_layers import SourceLayers
from come.merge.work import SpanSize, Work
from come.models.adapter import ModelAdapter, Unit
from come.models.layer_state import LayerState
from come.models.sublayers import States, head_outputs, hidden_activations, run_attention
from come.setting import setting

UNITS_OF: dict[str, Unit] = {"attention": "kv_group", "ffn": "channel"}
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 5  # with lambda "auto", every fifth window is held out


@REFITS.register
@dataclass(eq=False)
class Ridge(Refit):
    """Solves for the layer's output projections, first of the attention, then of the MLP.

        W_o = argmin sum_t w_t | (post_attention - x) - W a |^2 + mu |W - W_o0|^2
        W_d = argmin sum_t w_t | (output - h') - W f |^2 + mu |W - W_d0|^2
        mu  = lambda * mean diagonal of sum_t w_t a a^T   (f f^T)

    x: the layer's input in the current model; a: its head outputs; h' = x + W_o a; f: its hidden
    MLP activations on h'; post_attention, output: the targets (see `come.merge.reconstruction`).
    W_o0 and W_d0 are the projections of the merged layer before the refit. Output biases are solved
    together with their projections. With `align`, the input projections of each sublayer are
    aligned first (see `come.merge.alignment`). In a trial merge, unit selection may already have
    solved for W_o and W_d (`sources.solved`), with the mean diagonal over all units in mu; that
    solution is used.

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
        ["attention", "ffn"], "whose output maps are refitted", choices=tuple(UNITS_OF)
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
        adapter, index, state = targets.stream.adapter, targets.first, sources.state
        if self._same_as_selection and sources.solved:
            return _selection_solution(adapter, sources)
        layer = adapter.copy_layer(index, state)
        found: dict[str, Tensor] = {}
        for unit in self._units:
            if self.align is not None:
                found |= self._aligned(targets, sources, layer, unit)
                adapter.assign(layer, found)
            initial = output_map(adapter, layer, unit)
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
                keywords = targets.stream.keywords(len(batch.states), index)
                if unit == "kv_group":
                    features = head_outputs(adapter, layer, batch.states, keywords)
                    target = batch.post_attention - batch.states
                else:
                    post_attention = run_attention(adapter, layer, batch.states, keywords)[1]
                    features = hidden_activations(adapter, layer, post_attention, keywords)
                    target = batch.output - post_attention
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
            tensors = as_tensors(adapter, unit, solved, dict(layer.named_parameters()))
            found |= tensors
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

    @property
    def _units(self) -> list[Unit]:
        """The units whose output projections are solved for, in order."""
        return [unit for part, unit in UNITS_OF.items() if part in self.sublayers]

    def trial_work(self, size: SpanSize, solved: bool) -> Work:
        """The work of the alignment, and of the solve unless unit selection has the solution."""
        if solved and self._same_as_selection:
            copies = Work(bytes=2 * size.layer_bytes)
            return copies if self.align is None else size.aligned() + size.folded() + copies
        return self.plain().work(size)

    @property
    def _same_as_selection(self) -> bool:
        """Whether unit selection solves the same problem."""
        return len(self._units) == len(UNITS_OF) and self.lambda_ != "auto"

    def plain(self) -> Ridge:
        """This refit's ridge regression alone, for subclasses."""
        return Ridge(
            target=self.target,
            weights=self.weights,
            lambda_=self.lambda_,
            sublayers=self.sublayers,
            align=self.align,
        )

    def _aligned(
        self, targets: ReconstructionTargets, sources: SourceLayers, layer: nn.Module, unit: Unit
    ) -> LayerState:
        """The aligned input projections of one kind of unit; each layer's rows use its own map."""
        adapter, index = targets.stream.adapter, targets.first
        assert self.align is not None

        def reads(batch: TargetBatch) -> States:
            if unit == "kv_group":
                return batch.states
            keywords = targets.stream.keywords(len(batch.states), index)
            return run_attention(adapter, layer, batch.states, keywords)[1]

        norms = [adapter.copy_norm(unit, state) for state in sources.layers]
        own = layer.get_submodule(adapter.norm(unit))
        maps = input_maps(targets, unit, own, norms, reads, self.align)
        if unit in sources.kept:
            return _folded(adapter, unit, sources, dict(layer.named_parameters()), maps)
        folded = [  # the operator mixes rows of several layers
            fold_input_transform(adapter, unit, state, change)
            for state, change in zip(sources.layers, maps, strict=True)
        ]
        joined = sources.join(folded)
        return {name: joined[name] for name in input_tensors(adapter, unit)}

    def _solve(self, fit: Equations, held_out: Gram | None, initial: Map) -> Map:
        if held_out is None:
            return fit.solve(initial, self.lambda_ * fit.mean_diagonal(), consume=True)
        assert isinstance(fit, Gram)
        both = fit + held_out
        ratio = best_lambda(fit, held_out, initial, GRID) if held_out.yty else 0.1
        return both.solve(initial, ratio * both.mean_diagonal(), consume=True)


def _selection_solution(adapter: ModelAdapter, sources: SourceLayers) -> LayerState:
    """The tensors of unit selection's solution."""
    state, found = sources.state, dict[str, Tensor]()
    for unit, solved in sources.solved.items():
        if solved.inputs:
            found |= _folded(adapter, unit, sources, state, solved.inputs)
        found |= as_tensors(adapter, unit, solved.output, state)
    return found


def _folded(
    adapter: ModelAdapter,
    unit: Unit,
    sources: SourceLayers,
    state: LayerState,
    maps: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The merged layer's aligned input projections of one kind of unit, for kept units."""
    found = {}
    for name in input_tensors(adapter, unit):
        counts = [len(units) * adapter.roles[name].size for units in sources.kept[unit]]
        rows = state[name].split(counts)
        found[name] = torch.cat([transformed(*pair) for pair in zip(rows, maps, strict=True)])
    return found
