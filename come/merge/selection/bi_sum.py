"""The sum of the layers' block influences."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.statistics.influence import block_influence
from come.stream.stream import LayerStream


@SELECTION.register
class BISum(GroupScore):
    """Sum of block influence over the span; for one layer, ShortGPT's score.

        sum_{i = a..b} mean_tokens( 1 - clamp(cos(h_{i-1}, h_i), 0, 1) )

    Source: arXiv 2403.03853.
    """

    name = "bi_sum"
    paper = "2403.03853"
    source = "ShortGPT, block influence"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The sum, in [0, number of layers]."""
        return sum(
            token_mean(stream, index, index, self.tokens, block_influence)
            for index in range(first, last + 1)
        )
