"""Callbacks that do not keep their object alive.

An object that holds a callback to itself is freed only by the garbage collector, which runs by the
number of objects, not by the bytes of their tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weak_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a bound method of an object that still exists."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = reference()
        assert found is not None
        return found(*args)

    return call
