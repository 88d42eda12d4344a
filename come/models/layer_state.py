"""The tensors of a decoder layer by name, optionally computed or read from disk on access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

LayerState = Mapping[str, Tensor]
"""All tensors of one decoder layer, by their names relative to the layer."""


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, each recomputed on every access, so that none stays in memory.

    Args:
        makers: functions that return the tensors, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def changed(state: LayerState, makers: Mapping[str, Callable[[], Tensor]]) -> LazyState:
    """The state with some tensors replaced; every tensor is computed or read on access."""
    kept = {name: (lambda name=name: state[name]) for name in state}
    return LazyState({**kept, **makers})


def overlay(state: LayerState, others: LayerState) -> dict[str, Tensor]:
    """All tensors of the state, each replaced by the one in `others` with its name, if any."""
    return {name: others[name] if name in others else state[name] for name in state}
