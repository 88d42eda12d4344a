"""Gauss-Newton refit of the last sublayer's input projections, after the ridge refit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from come.merge.input_map import HELD_BYTES, InputMap
from come.merge.inside_layer import InsideLayer
from come.merge.reconstruction import ReconstructionTargets
from come.merge.refit.base import REFITS
from come.merge.refit.ridge import Ridge
from come.merge.source_layers import SourceLayers
from come.merge.work import SpanSize, Work
from come.models.layer_state import LayerState, overlay
from come.setting import setting


@REFITS.register
@dataclass(eq=False)
class GaussNewton(Ridge):
    """Solves by ridge regression, then refits the MLP's input projections by Gauss-Newton steps.

        W <- W + argmin_Z sum_t w_t | r_t - W_d (D_t * Z n_t) |^2 + mu mean_t |Z n_t|^2

    n: input of W; D: derivative of the hidden activations with respect to W n; r: target minus the
    layer's output (see `come.merge.input_map`). Projections are refitted in the family's order,
    gate before up. Hidden activations are linear in the up projection, so its step is the
    closed-form solution up to the truncation. No labels and no learning rate are needed.

    Source: this project; truncated Gauss-Newton is textbook, for networks see Martens 2010.
    """

    name = "gauss_newton"
    paper = ""
    source = "ridge regression, then a Gauss-Newton step on the FFN's input maps"

    align: float | None = setting(
        0.01,
        "penalty of the alignment of input maps; null for none",
        kind=float,
        above=0,
        optional=True,
    )
    input_lambda: float = setting(
        2.0, "penalty of the step on input maps, relative to the mean curvature", above=0
    )
    steps: int = setting(4, "steps of conjugate gradients for each input map", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "ffn" not in self.sublayers:
            raise ValueError(
                "merge.refit=gauss_newton solves for the input maps of the FFN, and "
                f"merge.refit.sublayers={list(self.sublayers)} leaves the FFN out: choose "
                "merge.refit=ridge"
            )

    @torch.no_grad()
    def solve(self, targets: ReconstructionTargets, sources: SourceLayers) -> LayerState:
        """The new tensors of the ridge refit, and of the MLP's input projections."""
        stream, adapter = targets.stream, targets.stream.adapter
        found = dict(super().solve(targets, sources))
        targets.release()
        sublayer = targets.layout.last
        if not sublayer.gates or sublayer.kind not in self.sublayers:
            return found
        layer = adapter.copy_layer(targets.place, overlay(sources.state, found))
        inside = InsideLayer(targets, layer, sublayer)
        with ExitStack() as stack:
            read = before = stack.enter_context(stream.scratch_boundary("refit"))
            if not inside.reads_sum:
                read = stack.enter_context(stream.scratch_boundary("refit-read"))
            for batch in targets:
                states = inside.streams(batch)
                read[batch.rows], before[batch.rows] = states
            for gate in sublayer.gates:
                problem = InputMap(targets, layer, sublayer, (read, before), gate)
                change = problem.step(self.input_lambda, self.steps)
                found[f"{gate.name}.weight"] = problem.changed(change)
                adapter.assign(layer, found)
        return found

    def work(self, size: SpanSize) -> Work:
        """The ridge regression, and 4 to 6 products of the MLP's size per step and projection."""
        held = 4.0 * size.tokens * (size.hidden + size.channels)
        held = held if held <= HELD_BYTES else 0.0
        # CG vectors, gram and root
        maps = 5 * 4.0 * size.hidden * size.channels + 16.0 * size.hidden**2
        product = Work(
            single=2.0 * size.tokens * size.hidden * size.channels,
            bytes=held + maps + 2 * size.layer_bytes,
        )
        each = self.steps * (4 if held else 6) + 10
        return super().work(size) + product * (size.input_maps * each)
