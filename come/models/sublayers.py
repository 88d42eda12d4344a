"""Runs the two sublayers of a decoder layer, attention and MLP, separately."""

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


class _StopForwardError(Exception):
    """Raised to end a layer's forward pass early."""


@torch.no_grad()
def run_attention(
    adapter: ModelAdapter, layer: nn.Module, states: States, keywords: Mapping[str, Any]
) -> tuple[Features, States]:
    """Runs a layer's attention, without its MLP.

    Args:
        adapter: the model.
        layer: a layer of the model, or a modified copy of one.
        states: the layer's input.
        keywords: the layer's keyword arguments for a batch of this size.

    Returns:
        The input of the attention's output projection, [batch, seq, heads * head_dim], and the
        residual stream after attention.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _StopForwardError

    output = layer.get_submodule(adapter.architecture.attention_output)
    mlp_norm = layer.get_submodule(adapter.architecture.ffn_norm)
    with (
        _before(output, lambda module, inputs: seen.append(inputs[0])),
        _before(mlp_norm, stop),
        suppress(_StopForwardError),
    ):
        layer(states, **keywords)
    features, residual = seen
    return features.view(*states.shape[:2], -1), residual.view(states.shape)


@torch.no_grad()
def head_outputs(
    adapter: ModelAdapter, layer: nn.Module, states: States, keywords: Mapping[str, Any]
) -> Features:
    """The input of the attention's output projection; arguments as for `run_attention`."""
    return _input_of(layer, adapter.architecture.attention_output, states, keywords)


@torch.no_grad()
def hidden_activations(
    adapter: ModelAdapter, layer: nn.Module, post_attention: States, keywords: Mapping[str, Any]
) -> Features:
    """Runs a layer's MLP on a residual stream, without its attention.

    Args:
        adapter: the model.
        layer: a layer of the model, or a modified copy of one.
        post_attention: the residual stream after attention, which the MLP's norm reads.
        keywords: the layer's keyword arguments for a batch of this size.

    Returns:
        The input of the MLP's output projection, [batch, seq, channels].
    """
    with _without_attention(adapter, layer):
        return _input_of(layer, adapter.architecture.ffn_output, post_attention, keywords)


def _input_of(layer: nn.Module, name: str, states: States, keywords: Mapping[str, Any]) -> Features:
    """The input of a module of the layer, whose forward pass ends there; [batch, seq, width]."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _StopForwardError

    with _before(layer.get_submodule(name), stop), suppress(_StopForwardError):
        layer(states, **keywords)
    return seen[0].view(*states.shape[:2], -1)


def activation_derivative(
    adapter: ModelAdapter,
    layer: nn.Module,
    post_attention: States,
    keywords: Mapping[str, Any],
    name: str,
) -> tuple[States, Features, Features]:
    """Derivative of the MLP's hidden activations by the output of one input projection.

    Each hidden activation f_tj depends on one row of each input projection, so its derivative is a
    scalar:

        D_tj = d f_tj / d (W n_t)_j

    Args:
        adapter: the model.
        layer: a layer of the model, or a modified copy of one.
        post_attention: the residual stream after attention, which the MLP's norm reads.
        keywords: the layer's keyword arguments for a batch of this size.
        name: the input projection W, one of the family's `ffn_inputs`.

    Returns:
        n, the input of W, [batch, seq, hidden], D and f, [batch, seq, channels] each.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.extend([inputs[0].detach(), out.detach().requires_grad_(True)])
        return seen[-1]

    handle = layer.get_submodule(name).register_forward_hook(cut)
    try:
        with torch.enable_grad(), _without_attention(adapter, layer):
            features = _input_of(layer, adapter.architecture.ffn_output, post_attention, keywords)
    finally:
        handle.remove()
    read, given = seen
    (slopes,) = torch.autograd.grad(features, given, torch.ones_like(features))
    shape = *post_attention.shape[:2], -1
    return read.view(post_attention.shape), slopes.view(shape), features.detach()


@contextmanager
def _without_attention(adapter: ModelAdapter, layer: nn.Module) -> Iterator[None]:
    """Replaces the attention of `layer` by one that returns 0 and computes nothing, while open."""
    attention = layer.get_submodule(adapter.architecture.attention)

    def zero_attention(hidden_states: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None

    own = vars(attention).get("forward")  # set by hooks of other libraries
    attention.forward = zero_attention
    try:
        yield
    finally:
        del attention.forward
        if own is not None:
            attention.forward = own


@contextmanager
def _before(
    module: nn.Module, see: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Calls `see` before every forward pass of `module`, while open."""
    handle = module.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()
