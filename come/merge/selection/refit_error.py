"""The reconstruction error that remains after the refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from come.merge.refit.base import Refit
from come.merge.selection.base import SELECTION, SpanScore
from come.merge.selection.cosine import mean_angle
from come.merge.span import LayerSpan, UnitAllocation
from come.models.layer_state import overlay
from come.models.sublayers import run_layer
from come.setting import setting
from come.stream.stream import LayerStream


@SELECTION.register
@dataclass(eq=False)
class RefitError(SpanScore):
    """Merges a shortlist of spans on trial, with their refit, and takes the lowest error.

        error = sum_t w_t | h_b - layer(h_{a-1}) |^2 / sum_t w_t | h_b |^2

    The choice and the refit thus use the same objective. The shortlist holds the spans with the
    smallest mean angle between input and output (`angular`). layer: the refitted layer; h_b and w:
    as in `come.merge.reconstruction`.

    Source: this project.
    """

    name = "refit_error"
    paper = ""
    source = "error of the refitted layer"
    uses_targets = True

    shortlist: int = setting(4, "spans that are merged on trial", least=1)

    @property
    def num_trials(self) -> int:
        """The size of the shortlist."""
        return self.shortlist

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Mean angle over pi, in [0, 1], which ranks spans for the shortlist."""
        return mean_angle(stream, first, last, self.tokens)

    @torch.no_grad()
    def refine(self, span: LayerSpan, split: UnitAllocation, refit: Refit) -> float:
        """The relative error, >= 0."""
        targets, adapter = span.targets, span.stream.adapter
        sources = span.sources(split)
        fitted = overlay(sources.state, refit.solve(targets, sources))
        layer = adapter.copy_layer(targets.place, fitted)
        missed, total = 0.0, 0.0
        for batch in targets:
            keywords = targets.keywords(len(batch.states))
            output = run_layer(layer, batch.states, keywords)
            target = batch.output.flatten(0, 1).double()
            gap = target - output.flatten(0, 1).double()
            missed += (batch.weights * gap.square().sum(dim=1)).sum().item()
            total += (batch.weights * target.square().sum(dim=1)).sum().item()
        return missed / total
