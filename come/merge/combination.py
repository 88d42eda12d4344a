"""The part of a merging method that its components may read."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Combination(Protocol):
    """Components and settings of a `come.merge.method.Method`, which documents them."""

    operator: Any
    sensitivity: Any
    selection: Any
    retention: Any
    schedule: Any
    refit: Any
    m: int
    tokens: str
    norms: str
    allow_remerge: bool
    protect_first: int
    protect_last: int
    sublayers: list[str]
    groups: list[list[int]]
    width: float
    width_multiple: int
    width_attention: float

    def slot(self, size: int) -> int:
        """The index in a span of the layer whose kind the merged layer has."""
        ...

    @property
    def block(self) -> str:
        """What is merged: "layer", "attention" or "ffn"."""
        ...

    @property
    def uses_targets(self) -> list[str]:
        """The settings whose components read reconstruction targets."""
        ...

    @property
    def needs_dense(self) -> bool:
        """Whether the hidden states of the dense model must be stored."""
        ...

    @property
    def measures_ahead(self) -> bool:
        """Whether merges after the first read no layer after their span."""
        ...

    def equals(self, record: Any) -> bool:
        """Whether a record, for example from a plan, describes this method."""
        ...
