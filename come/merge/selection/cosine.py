"""Cosine distance across the span."""

from __future__ import annotations

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.stream.stream import LayerStream


@SELECTION.register
class Cosine(GroupScore):
    """Mean cosine distance between the span's input and its output.

        mean_tokens( 1 - cos(h_{a-1}, h_b) )

    Source: arXiv 2505.02819 (ReplaceMe), for the choice of the block.
    """

    name = "cosine"
    paper = "2505.02819"
    source = "ReplaceMe, cosine distance of a block"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance, in [0, 2]."""
        return token_mean(stream, first, last, self.tokens, lambda cosine: 1 - cosine)
