"""Runs the sublayers of a decoder layer one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.models.layout import Gate, LayerLayout, Sublayer

States = Float[Tensor, "batch seq hidden"]
Features = Float[Tensor, "batch seq width"]


class _StopForwardError(Exception):
    """Raised to end a layer's forward pass early."""


def run_layer(layer: nn.Module, states: States, keywords: Mapping[str, Any]) -> States:
    """The output of a layer, which may be the first of several values that it returns."""
    found = layer(states, **keywords)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


@torch.no_grad()
def states_after(
    layer: nn.Module,
    layout: LayerLayout,
    sublayer: Sublayer,
    states: States,
    keywords: Mapping[str, Any],
) -> States:
    """The residual stream after a sublayer, before the scale of the layer.

    Args:
        layer: a layer of a model, or a modified copy of one.
        layout: its description.
        sublayer: the last sublayer to run.
        states: the layer's input.
        keywords: the layer's keyword arguments for a batch of this size.
    """
    with _silenced(layer, layout.after(sublayer)), _unscaled(layer, layout):
        return run_layer(layer, states, keywords).view(states.shape)


@torch.no_grad()
def hidden_features(
    layer: nn.Module,
    layout: LayerLayout,
    sublayer: Sublayer,
    states: States,
    keywords: Mapping[str, Any],
) -> Features:
    """The input of a sublayer's output projection: head outputs, or hidden activations of an MLP.

    Args:
        layer: a layer of a model, or a modified copy of one.
        layout: its description.
        sublayer: the sublayer to run; those before it are left out.
        states: the residual stream that the sublayer reads.
        keywords: the layer's keyword arguments for a batch of this size.
    """
    with _silenced(layer, layout.before(sublayer)):
        return _features(layer, sublayer, states, keywords)


def activation_derivative(
    layer: nn.Module,
    layout: LayerLayout,
    sublayer: Sublayer,
    states: States,
    keywords: Mapping[str, Any],
    gate: Gate,
) -> tuple[States, Features, Features]:
    """Derivative of the hidden activations by the output of one input projection.

    Each hidden activation f_tj depends on one row of each input projection, so its derivative is a
    scalar:

        D_tj = d f_tj / d (W n_t)_j

    Args:
        layer: a layer of a model, or a modified copy of one.
        layout: its description.
        sublayer: the sublayer; those before it are left out.
        states: the residual stream that the sublayer reads.
        keywords: the layer's keyword arguments for a batch of this size.
        gate: the input projection W, one of the sublayer's `gates`.

    Returns:
        n, the input of W, [batch, seq, hidden], D and f, [batch, seq, channels] each.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.extend([inputs[0].detach(), out.detach().requires_grad_(True)])
        return seen[-1]

    handle = layer.get_submodule(gate.name).register_forward_hook(cut)
    try:
        with torch.enable_grad(), _silenced(layer, layout.before(sublayer)):
            features = _features(layer, sublayer, states, keywords)
    finally:
        handle.remove()
    read, given = seen
    (slopes,) = torch.autograd.grad(features, given, torch.ones_like(features))
    shape = *states.shape[:2], -1
    slopes = slopes.view(shape)[..., gate.slice(features.shape[-1])]
    return read.view(states.shape), slopes, features.detach()


@contextmanager
def watch_features(
    layer: nn.Module, sublayer: Sublayer, see: Callable[[Tensor], None]
) -> Iterator[None]:
    """Calls `see` with the sublayer's features in every forward pass of the layer, while open.

    They are the input of its output projection, times what the output is multiplied by if a gate
    does so token by token, or times the mean over channels if it does so channel by channel; those
    of experts are described in `Experts`.
    """
    seen = dict[str, Tensor]()

    def arrive(name: str, found: Tensor) -> None:
        seen[name] = found.flatten(0, -2)
        if len(seen) == len(sublayer.joined):
            see(torch.cat([seen.pop(each.name) for each in sublayer.joined], dim=-1))

    with ExitStack() as stack:
        for part in sublayer.joined:
            stack.enter_context(watch_features(layer, part, partial(arrive, part.name)))
        if not sublayer.joined:
            stack.enter_context(_watched(layer, sublayer, see))
        yield


@contextmanager
def _watched(layer: nn.Module, sublayer: Sublayer, see: Callable[[Tensor], None]) -> Iterator[None]:
    """As `watch_features`, for a sublayer that is no sum of others."""
    experts, seen = sublayer.experts, dict[str, Tensor]()
    gate = sublayer.output_gate or sublayer.channel_gate

    def arrive(name: str, found: Tensor) -> None:
        seen[name] = found
        if len(seen) == 1 + bool(gate):
            features, *gates = (seen.pop(key) for key in sorted(seen))
            factors = [torch.sigmoid(given).mean(dim=-1, keepdim=True) for given in gates]
            see(features * factors[0] if factors else features)

    def called(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = (*inputs, *keywords.values())
        arrive("features", experts.features(layer, *given) if experts else given[0])

    def gated(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        arrive("gate", output)

    output = layer.get_submodule(sublayer.output)
    handles = [output.register_forward_pre_hook(called, with_kwargs=True)]
    if gate:
        handles.append(layer.get_submodule(gate).register_forward_hook(gated))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(
    layer: nn.Module, sublayer: Sublayer, states: States, keywords: Mapping[str, Any]
) -> Features:
    """The sublayer's features; the layer's forward pass ends there; [batch, seq, width]."""
    seen: list[Tensor] = []

    def stop(found: Tensor) -> None:
        seen.append(found)
        raise _StopForwardError

    with suppress(_StopForwardError), watch_features(layer, sublayer, stop):
        layer(states, **keywords)
    return seen[0].view(*states.shape[:2], -1)


@contextmanager
def _silenced(layer: nn.Module, sublayers: Sequence[Sublayer]) -> Iterator[None]:
    """Leaves out sublayers of a layer while open: their modules return 0 and compute nothing."""
    with ExitStack() as stack:
        for sublayer in sublayers:
            for name, returns in sublayer.silenced:
                stack.enter_context(_replaced(layer.get_submodule(name), partial(_zeros, returns)))
        yield


@contextmanager
def _unscaled(layer: nn.Module, layout: LayerLayout) -> Iterator[None]:
    """Makes a layer return the sum of its input and its sublayers while open."""
    if not layout.scale:
        yield
        return
    owner, _, name = layout.scale.rpartition(".")
    buffers, own = layer.get_submodule(owner)._buffers, layer.get_buffer(layout.scale)
    buffers[name] = torch.ones_like(own)
    try:
        yield
    finally:
        buffers[name] = own


def _zeros(returns: int, *inputs: Any, **keywords: Any) -> Any:
    """Zeros like the first tensor that a module is called with, alone or first of a tuple."""
    first = next(value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor))
    zeros = torch.zeros_like(first)
    return (zeros, *[None] * (returns - 1)) if returns else zeros


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward function of a module while open."""
    own = vars(module).get("forward")  # set by hooks of other libraries
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
