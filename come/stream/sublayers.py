"""The residual stream after the attention of every layer, for spans of one kind of sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from come.models.adapter import ModelAdapter
from come.models.sublayers import States, states_after
from come.stream.boundaries import BoundaryStore


class MiddleStates:
    """Stores the residual stream after the last sublayer of every layer that mixes tokens.

    Args:
        adapter: the model.
        store: holds the states, one slot a layer.
    """

    def __init__(self, adapter: ModelAdapter, store: BoundaryStore) -> None:
        self._adapter = adapter
        self._store = store

    def allocate(self, index: int) -> None:
        """Allocates the slot of layer `index`; all processes do so, also without windows."""
        self._store.writable(index)

    def of_layer(self, index: int) -> Float[Tensor, "windows seq hidden"]:
        """The states of layer `index`."""
        return self._store[index]

    def fill(self, index: int, rows: slice, states: States, keywords: Mapping[str, Any]) -> None:
        """Computes the states of windows `rows` from the input of layer `index`."""
        layer, layout = self._adapter.layer(index), self._adapter.layer_layout(index)
        last = layout.of("attention")[-1]
        self._store[index][rows] = states_after(layer, layout, last, states, keywords)

    def close(self) -> None:
        """Frees the states."""
        self._store.close()
