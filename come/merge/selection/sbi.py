"""CoMe's score of a span: spherical block influence."""

from __future__ import annotations

import math

import torch

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.stream.stream import LayerStream


@SELECTION.register
class SBI(GroupScore):
    """Mean angle, as a fraction of pi, by which the span rotates the hidden states.

        SBI_g = mean_tokens( arccos(clamp(cos(h_{a-1}, h_b), 0, 1)) / pi )

    for a span of layers a..b of any size. In [0, 0.5].

    Source: arXiv 2510.15304. Which tokens count is our choice (`merge.tokens`), the same for SBI
    and BI; `merge=come` uses `last`, which experiments/LOG.md compares with `all`.
    """

    name = "sbi"
    paper = "2510.15304"
    source = "CoMe, spherical block influence"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """SBI of layers first..last, in [0, 0.5]."""
        return token_mean(
            stream,
            first,
            last,
            self.tokens,
            lambda cosine: torch.arccos(cosine.clamp(0, 1)) / math.pi,
        )
