"""Splits tokens into blocks of fixed size, so that sums do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1024  # tokens


class TokenBlocks:
    """Buffers the rows of batches of any size and passes them on, in order, in blocks of 1024.

    A floating-point sum depends on how its terms are grouped. With blocks of fixed size, batches
    of any size give bitwise identical sums.

    Args:
        use: called with each block: the rows of every tensor for the same tokens.
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
        """Passes on the remaining rows as a shorter block, if there are any."""
        if self._rest:
            self._use(*self._rest)
            self._rest = ()
