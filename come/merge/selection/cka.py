"""Linear centred kernel alignment across the span."""

from __future__ import annotations

import torch
from torch import Tensor

from come.merge.selection.base import SELECTION, SpanScore
from come.stream.stream import LayerStream


@SELECTION.register
class CKA(SpanScore):
    """One minus linear CKA of the span's input X and output Y, over all tokens.

        1 - || Yc^T Xc ||_F^2 / ( || Xc^T Xc ||_F || Yc^T Yc ||_F )

    Xc, Yc: [tokens, hidden], each channel centred. The three products accumulate batch by batch in
    float64, so no hidden states are stored.

    Source: arXiv 1905.00414.
    """

    name = "cka"
    paper = "1905.00414"
    source = "linear CKA"

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """The distance, in [0, 1]."""
        products: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for before, after in stream.span(first, last):
            x, y = (states.flatten(0, 1).double() for states in (before, after))
            for name, a, b in (("xx", x, x), ("yy", y, y), ("yx", y, x)):
                products[name] = products.get(name, 0) + a.T @ b
            for name, a in (("x", x), ("y", y)):
                sums[name] = sums.get(name, 0) + a.sum(dim=0)

        def squared(name: str) -> Tensor:
            centred = products[name] - torch.outer(sums[name[0]], sums[name[1]]) / stream.tokens
            return centred.square().sum()

        alignment = squared("yx") / (squared("xx") * squared("yy")).sqrt().clamp_min(1e-300)
        return 1 - alignment.item()
