"""The two halves of a decoder layer, run apart: attention, then FFN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.models.adapter import ModelAdapter

States = Float[Tensor, "batch seq hidden"]
Features = Float[Tensor, "batch seq width"]


class _EnoughError(Exception):
    """Ends a layer's forward pass early."""


@torch.no_grad()
def attention_half(
    adapter: ModelAdapter, layer: nn.Module, states: States, keywords: Mapping[str, Any]
) -> tuple[Features, States]:
    """Runs a layer up to the middle, where the FFN begins.

    Args:
        adapter: the model.
        layer: a layer of the model, or one beside it.
        states: the layer's input.
        keywords: the layer's keyword arguments for a batch of this size.

    Returns:
        What its attention's output map reads, [batch, seq, heads * head_dim], and the residual
        stream behind the attention.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _EnoughError

    output = layer.get_submodule(adapter.architecture.attention_output)
    middle = layer.get_submodule(adapter.architecture.ffn_norm)
    with (
        _before(output, lambda module, inputs: seen.append(inputs[0])),
        _before(middle, stop),
        suppress(_EnoughError),
    ):
        layer(states, **keywords)
    features, residual = seen
    return features.view(*states.shape[:2], -1), residual.view(states.shape)


@torch.no_grad()
def ffn_half(
    adapter: ModelAdapter, layer: nn.Module, middle: States, keywords: Mapping[str, Any]
) -> tuple[Features, States]:
    """Runs a layer's FFN on a residual stream, its attention silenced.

    Args:
        adapter: the model.
        layer: a layer of the model, or one beside it.
        middle: the residual stream in front of the FFN.
        keywords: the layer's keyword arguments for a batch of this size.

    Returns:
        What its FFN's output map reads, [batch, seq, channels], and the layer's output.
    """
    seen: list[Tensor] = []
    silent = layer.get_submodule(adapter.architecture.attention_output)
    handle = silent.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    output = layer.get_submodule(adapter.architecture.ffn_output)
    try:
        with _before(output, lambda module, inputs: seen.append(inputs[0])):
            after = layer(middle, **keywords)
    finally:
        handle.remove()
    return seen[0].view(*middle.shape[:2], -1), after


@contextmanager
def _before(
    module: nn.Module, see: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Calls `see` before every forward pass of `module` while open."""
    handle = module.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()
