"""Any layers: the control of every choice."""

from __future__ import annotations

import hashlib

from come.merge.selection.base import SELECTION, GroupScore
from come.stream.stream import LayerStream


@SELECTION.register
class Random(GroupScore):
    """Uniform in [0, 1), the same for the same seed and place of the span.

    Args:
        seed: of the choice.
    """

    name = "random"
    paper = ""
    source = "control"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """A number in [0, 1)."""
        text = f"{self.seed}/{first}-{last}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
