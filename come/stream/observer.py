"""Observers and counters of forward passes through layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Update = Callable[[Tensor, Tensor], None]


@runtime_checkable
class LayerObserver(Protocol):
    """Accumulates statistics while the windows pass through a layer."""

    def layer(self, index: int) -> AbstractContextManager[Update]:
        """Returns a context that is open while all windows pass through layer `index`.

        The context's value is called after every batch with the layer's input and output,
        [batch, seq, hidden] each. Hooks are installed on entry and removed on exit.
        """
        ...


@dataclass
class Meter:
    """Counts forward passes of one token through one layer."""

    tokens: int = 0
