"""The states between attention and MLP of every layer, for spans that consist of one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from come.models.adapter import ModelAdapter
from come.stream.boundaries import BoundaryStore


class MiddleStates:
    """Stores the states that enter the norm before the MLP of each layer.

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

    @contextmanager
    def watch(self, index: int, rows: slice) -> Iterator[None]:
        """Stores the states of windows `rows` while layer `index` runs on them."""

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            slot = self._store[index][rows]
            slot.copy_(inputs[0].view(slot.shape))

        handle = self._adapter.mlp_norm_module(index).register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def close(self) -> None:
        """Frees the states."""
        self._store.close()
