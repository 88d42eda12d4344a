"""Gradients of the calibration loss, by backpropagation through one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from come.models.adapter import ModelAdapter
from come.models.layout import Sublayer, Unit
from come.models.loss import BLOCK, window_nll
from come.models.sublayers import run_layer
from come.stream.stream import LayerStream

PATH_STEPS = 10


def backward(
    stream: LayerStream, first: int, leaves: Callable[[int], Sequence[Tensor]]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Gradients of the mean calibration loss per predicted token, from the last layer to `first`.

    Every layer is recomputed from its input boundary. Memory holds the graph of one layer and one
    batch, and one boundary of gradients. The cost is about three layer passes per layer, and the
    head.

    Args:
        stream: a stream with all boundaries of the current model.
        first: the last layer to process, since layers run in reverse order.
        leaves: returns the tensors of layer `index` to differentiate with respect to; they must
            require gradients.

    Yields:
        The layer's index, and dL/dleaf of each leaf, in its shape, float32 or wider, in nats per
        unit of the leaf.
    """
    adapter = stream.adapter
    gradient = _loss_gradient(stream)
    for index in range(adapter.num_layers - 1, first - 1, -1):
        tensors = list(leaves(index))
        sums = [
            torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            for leaf in tensors
        ]
        for rows, before in stream.through(index, []):
            with torch.enable_grad():
                inputs = before.detach().requires_grad_()
                keywords = stream.keywords(len(inputs), index)
                after = run_layer(adapter.layer(index), inputs, keywords)
                found = torch.autograd.grad(
                    after, [inputs, *tensors], gradient[rows].to(after.device)
                )
            gradient[rows] = found[0].to(gradient)
            for total, part in zip(sums, found[1:], strict=True):
                total += part
        yield index, sums


def _loss_gradient(stream: LayerStream) -> Float[Tensor, "windows seq hidden"]:
    """dL/dh of the last boundary, in the model's dtype, in main memory.

    A token's loss depends only on the state that predicts it, so the logits of one block of tokens
    are computed at a time.
    """
    adapter = stream.adapter
    found = []
    for rows, states in stream.through(adapter.num_layers, []):
        ids = stream.windows[rows].to(states.device)
        gradient = torch.zeros_like(states, device="cpu")
        for window, tokens in enumerate(ids):
            for start in range(0, len(tokens) - 1, BLOCK):
                with torch.enable_grad():
                    own = slice(start, start + BLOCK + 1)
                    inputs = states[window : window + 1, own].detach().requires_grad_()
                    nll = window_nll(adapter.head, adapter.final_norm(inputs), tokens[None, own])
                    (part,) = torch.autograd.grad(nll.sum() / stream.predicted, [inputs])
                gradient[window, own] += part[0].cpu()
        found.append(gradient)
    return torch.cat(found)


def output_weights(adapter: ModelAdapter, index: int) -> dict[str, Tensor]:
    """The stored tensors of a layer's output projections, in the order of its sublayers."""
    layer, layout = adapter.layer(index), adapter.layer_layout(index)
    return {name: layer.get_parameter(name) for each in layout for name in each.weights}


def weight_gradients(
    stream: LayerStream, layers: Sequence[int]
) -> dict[tuple[int, Unit], Float[Tensor, "out in"]]:
    """dL/dW of the output projections of the given layers, float32 or wider."""
    found: dict[tuple[int, Unit], Tensor] = {}

    def leaves(index: int) -> list[Tensor]:
        return [*output_weights(stream.adapter, index).values()] if index in layers else []

    with trainable(stream.adapter, layers):
        for index, gradients in backward(stream, min(layers), leaves):
            if index not in layers:
                continue
            names = output_weights(stream.adapter, index)
            tensors = dict(zip(names, gradients, strict=True))
            for each in stream.adapter.layer_layout(index):
                found[index, each.unit] = each.output_weight(tensors).cpu()
    return found


def path_gradients(
    stream: LayerStream, layers: Sequence[int], steps: int = PATH_STEPS
) -> dict[tuple[int, Unit], Float[Tensor, " in"]]:
    """Integrated gradients of the loss with respect to one scale on each input channel.

        A_j = integral_0^1 dL/ds_j at s = (a, .., a) da, by the midpoint rule in `steps` steps

    s_j scales channel j of an output projection's input. The scales of all channels of all layers
    go from 0 to 1 together, so the A_j of the whole model sum to L(1) - L(0), up to the error of
    the midpoint rule. The cost is `steps` forward passes, `steps` backward passes down to the
    first of `layers`, and a second set of boundaries.

    Returns:
        A of each output projection of `layers`, [d_in], float64, nats, signed.
    """
    adapter = stream.adapter
    layouts = [adapter.layer_layout(index) for index in range(adapter.num_layers)]
    total: dict[tuple[int, Unit], Tensor] = {}
    for step in range(steps):
        scales: dict[tuple[int, Unit], Tensor] = {}
        for index, layout in enumerate(layouts):
            for each in layout:
                weight = adapter.output_weight(index, each).detach()
                scale = torch.full_like(weight[0], (step + 0.5) / steps)
                scales[index, each.unit] = scale.requires_grad_()

        def leaves(index: int, scales: dict[tuple[int, Unit], Tensor] = scales) -> list[Tensor]:
            units = layouts[index].unit_counts if index in layers else ()
            return [scales[index, unit] for unit in units]

        with _scaled(adapter, scales), stream.fork() as scaled:
            scaled.embed()
            scaled.advance(0, adapter.num_layers - 1)
            for index, gradients in backward(scaled, min(layers), leaves):
                for unit, gradient in zip(layouts[index].unit_counts, gradients, strict=False):
                    part = gradient.double().cpu() / steps
                    total[index, unit] = total.get((index, unit), 0) + part
    return total


@contextmanager
def trainable(adapter: ModelAdapter, layers: Sequence[int]) -> Iterator[None]:
    """Enables gradients for the parameters of the given layers only, while open."""
    before = {name: p.requires_grad for name, p in adapter.model.named_parameters()}
    try:
        adapter.model.requires_grad_(False)
        for index in layers:
            adapter.layers[index].requires_grad_(True)
        yield
    finally:
        for name, parameter in adapter.model.named_parameters():
            parameter.requires_grad_(before[name])


@contextmanager
def _scaled(adapter: ModelAdapter, scales: dict[tuple[int, Unit], Tensor]) -> Iterator[None]:
    """Multiplies the input of every output projection by its scale, while open."""

    def hook(scale: Tensor, own: slice) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        return lambda module, inputs: inputs[0] * scale[own]

    handles: list[RemovableHandle] = []
    for index in range(adapter.num_layers):
        for each in adapter.layer_layout(index):
            scale, start = scales[index, each.unit], 0
            for part in each.parts:
                own = slice(start, start + part.width)
                start += part.width
                if part.experts:
                    handles += _scale_experts(adapter.layers[index], part, scale, own)
                else:
                    module = adapter.output_map(index, part)
                    handles.append(module.register_forward_pre_hook(hook(scale, own)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scale_experts(
    layer: nn.Module, sublayer: Sublayer, scale: Tensor, own: slice
) -> list[RemovableHandle]:
    """Makes experts run with the columns of their output projections scaled by `scale[own]`."""
    stored: dict[str, nn.Parameter] = {}

    def places(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            yield name, layer.get_submodule(owner)._parameters, leaf

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stored.update({name: layer.get_parameter(name) for name in sublayer.weights})
        scaled = sublayer.output_tensors(sublayer.output_weight(stored) * scale[own])
        for name, parameters, leaf in places(stored):
            parameters[leaf] = scaled[name]

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, parameters, leaf in places(stored):
            parameters[leaf] = stored[name]

    module = layer.get_submodule(sublayer.output)
    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
