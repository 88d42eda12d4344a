"""Sums over tokens in blocks of one size, so that they do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1024  # tokens


class TokenBlocks:
    """Hands on rows in blocks of 1024, in their order, however they arrive.

    Sums of floating-point numbers depend on how they are split. With blocks of one size, batches
    of any size give the same sum, bit for bit.

    Args:
        use: is called with every block, the tensors' rows of the same tokens.
    """

    def __init__(self, use: Callable[..., None]) -> None:
        self._use = use
        self._rest: tuple[Tensor, ...] = ()

    def add(self, *rows: Tensor) -> None:
        """Adds the rows of a batch, [tokens, ...] each."""
        if self._rest:
            rows = tuple(torch.cat(pair) for pair in zip(self._rest, rows, strict=True))
        whole = len(rows[0]) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._use(*(tensor[start : start + BLOCK] for tensor in rows))
        self._rest = tuple(tensor[whole:] for tensor in rows) if whole < len(rows[0]) else ()

    def finish(self) -> None:
        """Hands on what is left, a shorter block."""
        if self._rest:
            self._use(*self._rest)
            self._rest = ()
