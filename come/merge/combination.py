"""A method as each of its parts sees it when the part says what it requires."""

from __future__ import annotations

from typing import Any, Protocol


class Combination(Protocol):
    """Parts and settings of a `come.merge.method.Method`, which has their meaning."""

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

    @property
    def block(self) -> str:
        """What is merged: "layer", "attention" or "ffn"."""
        ...

    @property
    def uses_targets(self) -> list[str]:
        """The settings whose parts read reconstruction targets."""
        ...
