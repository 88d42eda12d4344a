"""Random scores, a control for the other selection scores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from come.merge.selection.base import SELECTION, SpanScore
from come.setting import setting
from come.stream.stream import LayerStream


@SELECTION.register
@dataclass(eq=False)
class Random(SpanScore):
    """Uniform in [0, 1), determined by the seed and the position of the span."""

    name = "random"
    paper = ""
    source = "control"

    seed: int = setting(0, "seeds the scores")

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """A number in [0, 1)."""
        text = f"{self.seed}/{first}-{last}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
