"""The residual stream after the attention of every layer, for spans of one kind of sublayer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from come.models.adapter import ModelAdapter
from come.stream.boundaries import BoundaryStore


class PostAttentionStates:
    """Stores the input of every layer's MLP norm: the residual stream after attention.

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

        def store(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            slot = self._store[index][rows]
            slot.copy_(inputs[0].view(slot.shape))

        handle = self._adapter.mlp_norm_module(index).register_forward_pre_hook(store)
        try:
            yield
        finally:
            handle.remove()

    def close(self) -> None:
        """Frees the states."""
        self._store.close()
