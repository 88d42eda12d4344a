"""The output maps, solved for by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from come.linalg.gram import Gram, Map, best_lambda, check_lambda
from come.merge.alignment import fold_input_transform, input_maps, input_tensors
from come.merge.output_map import as_tensors, equations, output_map
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.merge.refit.base import REFITS, Refit
from come.merge.span import SourceLayers
from come.models.adapter import LayerState, Unit
from come.models.sublayers import States, run_attention, run_mlp

PARTS = ("attention", "ffn")
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 5  # with lambda "auto" every fifth window is held out


@REFITS.register
class Ridge(Refit):
    """Solves for the layer's output maps, attention first, then the FFN behind it.

        W_o = argmin sum_t w_t | (middle - x) - W a |^2 + mu |W - W_o0|^2
        W_d = argmin sum_t w_t | (output - h') - W f |^2 + mu |W - W_d0|^2
        mu  = lambda * mean diagonal of sum_t w_t a a^T   (f f^T)

    x: the layer's true input; a: its head outputs; h' = x + W_o a; f: its FFN activations on h'.
    W_o0 and W_d0 are what the operator made. Output biases are solved for with their maps. With
    `align_lambda` the input maps of each part are aligned first (see `come.merge.alignment`).

    Source: this project; the closed form is that of arXiv 2505.02819 and 2602.08858, which solve
    for the FFN's map alone.

    Args:
        refit_lambda: relative to the mean diagonal, or "auto": the one of 0.01 ... 3 with the
            least error on every fifth window, solved on the others; then all are solved on.
        refit_parts: which maps, of "attention" and "ffn".
        align_lambda: penalty of the input maps' alignment; None for none.
    """

    name = "ridge"
    paper = ""
    source = "ridge regression to the group's output"

    def __init__(
        self,
        refit_lambda: Any = 0.1,
        refit_parts: Sequence[str] = PARTS,
        align_lambda: float | None = None,
    ) -> None:
        if not refit_parts or not set(refit_parts) <= set(PARTS):
            raise ValueError(
                f"merge.refit_parts={list(refit_parts)}: allowed are [attention], [ffn] and "
                "[attention,ffn]"
            )
        self.ratio = check_lambda("merge.refit_lambda", refit_lambda)
        self.parts = refit_parts
        self.align = align_lambda

    def solve(self, goals: ReconstructionTargets, pieces: SourceLayers) -> LayerState:
        """The output maps' new tensors, and those of the input maps where they are aligned."""
        adapter, index, state = goals.stream.adapter, goals.first, pieces.state
        layer = adapter.copy_layer(index, state)
        found: LayerState = {}
        units: tuple[tuple[str, Unit], ...] = (("attention", "kv_group"), ("ffn", "channel"))
        for part, unit in units:
            if part not in self.parts:
                continue
            if self.align is not None:
                found |= self._aligned(goals, pieces, layer, unit)
                layer.load_state_dict({**state, **found})
            prior = output_map(adapter, layer, unit)
            fit, held_out = equations(prior, adapter), equations(prior, adapter)
            for goal in goals:
                keywords = goals.stream.keywords(len(goal.states), index)
                features, middle = run_attention(adapter, layer, goal.states, keywords)
                wanted = goal.middle - goal.states
                if unit == "channel":
                    features, _ = run_mlp(adapter, layer, middle, keywords)
                    wanted = goal.output - middle
                apart = (goal.windows % HELD_OUT == HELD_OUT - 1) & (self.ratio == "auto")
                for sums, chosen in ((fit, ~apart), (held_out, apart)):
                    sums.add(
                        features[chosen].flatten(0, 1),
                        wanted[chosen].flatten(0, 1),
                        goal.weights.view(wanted.shape[:2])[chosen].flatten(),
                    )
            solved = self._solve(fit, held_out, prior)
            tensors = as_tensors(adapter, unit, solved, state)
            found |= tensors
            layer.load_state_dict({**state, **found})
        return found

    def _aligned(
        self, goals: ReconstructionTargets, pieces: SourceLayers, layer: nn.Module, unit: Unit
    ) -> LayerState:
        """The input maps of a kind of unit, each layer's rows reading through its own map."""
        adapter, index = goals.stream.adapter, goals.first
        assert self.align is not None

        def reads(goal: TargetBatch) -> States:
            if unit == "kv_group":
                return goal.states
            keywords = goals.stream.keywords(len(goal.states), index)
            return run_attention(adapter, layer, goal.states, keywords)[1]

        sources = [adapter.copy_layer(index, piece) for piece in pieces.layers]
        maps = input_maps(goals, unit, layer, sources, reads, self.align)
        joined = pieces.join(
            [
                fold_input_transform(adapter, unit, s, m)
                for s, m in zip(pieces.layers, maps, strict=True)
            ]
        )
        return {name: joined[name] for name in input_tensors(adapter, unit)}

    def _solve(self, fit: Gram, held_out: Gram, prior: Map) -> Map:
        both = fit + held_out
        ratio = self.ratio
        if isinstance(ratio, str):
            ratio = best_lambda(fit, held_out, prior, GRID) if held_out.energy else 0.1
        return both.solve(prior, ratio * both.mean_diagonal())
