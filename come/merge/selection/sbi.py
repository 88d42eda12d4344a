"""CoMe's score of a group: spherical block influence."""

from __future__ import annotations

import math

import torch

from come.merge.selection.base import SELECTION, GroupScore, token_mean
from come.stream.stream import LayerStream


@SELECTION.register
class SBI(GroupScore):
    """Mean angle, as a share of pi, by which the group turns the hidden states.

        SBI_g = mean_tokens( arccos(clamp(cos(h_{a-1}, h_b), 0, 1)) / pi )

    for a group of layers a..b, whatever its size. In [0, 0.5].

    Source: arXiv 2510.15304. Which tokens count is our choice, the same for SBI and BI; the
    default is `last`, measured against `all` in experiments/LOG.md.
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
