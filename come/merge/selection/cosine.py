"""Scores of a span from the cosine between its input and its output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from come.merge.selection.base import SELECTION, SpanScore, token_mean
from come.statistics.influence import TOKENS, block_influence
from come.stream.stream import LayerStream


@SELECTION.register
class SBI(SpanScore):
    """Spherical block influence: mean clamped angle between the span's input and its output.

        mean_tokens( arccos(clamp(cos(h_{a-1}, h_b), 0, 1)) / pi ), in [0, 0.5]

    for a span of layers a..b of any size.

    Source: arXiv 2510.15304. Which tokens count is our choice (`merge.tokens`), the same for SBI
    and BI; `merge=come` uses `last`, which experiments/LOG.md compares with `all`.
    """

    name = "sbi"
    paper = "2510.15304"
    source = "CoMe, spherical block influence"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """SBI of layers first..last."""

        def angle(cosine: Tensor) -> Tensor:
            return torch.arccos(cosine.clamp(0, 1)) / math.pi

        return token_mean(stream, first, last, self.tokens, angle)


@SELECTION.register
class Angular(SpanScore):
    """Angular distance: like `sbi`, but angles above 90 degrees are not clamped.

        mean_tokens( arccos(cos(h_{a-1}, h_b)) / pi ), in [0, 1]

    Source: arXiv 2403.17887 (UIDL), which uses the last token only.
    """

    name = "angular"
    paper = "2403.17887"
    source = "UIDL, angular distance"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance of layers first..last."""
        return mean_angle(stream, first, last, self.tokens)


@SELECTION.register
class Cosine(SpanScore):
    """Mean cosine distance between the span's input and its output.

        mean_tokens( 1 - cos(h_{a-1}, h_b) ), in [0, 2]

    Source: arXiv 2505.02819 (ReplaceMe), for the choice of the block.
    """

    name = "cosine"
    paper = "2505.02819"
    source = "ReplaceMe, cosine distance of a block"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance of layers first..last."""
        return token_mean(stream, first, last, self.tokens, lambda cosine: 1 - cosine)


@SELECTION.register
class BISum(SpanScore):
    """Sum of block influence over the span's layers; for one layer, ShortGPT's score.

        sum_{i = a..b} mean_tokens( 1 - clamp(cos(h_{i-1}, h_i), 0, 1) ), in [0, number of layers]

    Source: arXiv 2403.03853.
    """

    name = "bi_sum"
    paper = "2403.03853"
    source = "ShortGPT, block influence"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The sum over layers first..last."""
        return sum(
            token_mean(stream, index, index, self.tokens, block_influence)
            for index in range(first, last + 1)
        )


def mean_angle(stream: LayerStream, first: int, last: int, tokens: TOKENS) -> float:
    """Mean angle over pi between input and output of layers first..last, in [0, 1]."""
    return token_mean(
        stream, first, last, tokens, lambda cosine: torch.arccos(cosine.clamp(-1, 1)) / math.pi
    )
