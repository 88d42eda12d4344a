"""UIDL's score: angular distance across the span."""

from __future__ import annotations

import math

import torch

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.statistics.influence import TOKENS
from come.stream.stream import LayerStream


@SELECTION.register
class Angular(GroupScore):
    """Mean angle, as a fraction of pi, between the span's input and its output.

        mean_tokens( arccos(cos(h_{a-1}, h_b)) / pi )

    Like `sbi`, but angles above 90 degrees are not clamped.

    Source: arXiv 2403.17887 (UIDL), which uses the last token only.
    """

    name = "angular"
    paper = "2403.17887"
    source = "UIDL, angular distance"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance, in [0, 1]."""
        return mean_angle(stream, first, last, self.tokens)


def mean_angle(stream: LayerStream, first: int, last: int, tokens: TOKENS) -> float:
    """Mean angle over pi between input and output of layers first..last, in [0, 1]."""
    return token_mean(
        stream, first, last, tokens, lambda cosine: torch.arccos(cosine.clamp(-1, 1)) / math.pi
    )
