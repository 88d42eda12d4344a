"""Records what the layers of a model are called with, without running them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "use_cache")


@contextmanager
def recording(
    layers: nn.ModuleList, returns: int, calls: list[tuple[Tensor, dict[str, Any]]]
) -> Iterator[None]:
    """Makes every layer record its input and arguments and return its input, while open."""

    def recorder(layer: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(type(layer).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            (_, states), *given = _arguments(signature, layer, *args, **kwargs)
            calls.append((states, {name: value for name, value in given if name not in _CACHES}))
            return (states, *[None] * (returns - 1)) if returns else states

        return forward

    try:
        for layer in layers:
            layer.forward = recorder(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _arguments(signature: inspect.Signature, *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
    """The arguments of a method's call by name, without the object itself."""
    bound = signature.bind(*args, **kwargs).arguments
    _, *named = bound.items()
    open_ended = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    found = [(name, value) for name, value in named if name not in open_ended]
    return found + [pair for name in open_ended for pair in bound.get(name, {}).items()]
