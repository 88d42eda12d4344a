"""Caches of the tokens that a model has read, which types of models name differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

NAMES = ("past_key_values", "cache_params", "state")


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a model has returned, as the argument that continues from it."""
    return {name: output[name] for name in NAMES if name in output}


def numbers_of(cache: object) -> Iterator[Tensor]:
    """The tensors of a cache that hold numbers, in whatever it consists of."""
    if isinstance(cache, Tensor):
        if cache.is_floating_point():
            yield cache
        return
    parts: Iterable[object] = ()
    if isinstance(cache, Mapping):
        parts = cache.values()
    elif isinstance(cache, list | tuple):
        parts = cache
    elif type(cache).__module__.startswith("transformers."):
        parts = vars(cache).values()
    for part in parts:
        yield from numbers_of(part)
