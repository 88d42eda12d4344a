"""The sum of the layers' block influences."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.statistics.influence import TOKENS, block_influence, check_tokens
from come.stream.stream import LayerStream


@SELECTION.register
class BISum(GroupScore):
    """Sum of block influence over the span; for one layer, ShortGPT's score.

        sum_{i = a..b} mean_tokens( 1 - clamp(cos(h_{i-1}, h_i), 0, 1) )

    Source: arXiv 2403.03853.

    Args:
        tokens: "all", or "last" for the last token of each window.
    """

    name = "bi_sum"
    paper = "2403.03853"
    source = "ShortGPT, block influence"

    def __init__(self, tokens: TOKENS = "last") -> None:
        self.tokens = check_tokens(tokens)

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The sum, in [0, number of layers]."""
        return sum(
            token_mean(stream, index, index, self.tokens, block_influence)
            for index in range(first, last + 1)
        )
