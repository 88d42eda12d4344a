"""Applies merges to a model, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from come.merge.dropped import zero_dropped
from come.merge.norms import balanced_norms, check_norms, fold_norms, folded_roles
from come.merge.operators.base import OPERATORS, MergeOperator
from come.merge.plan import MergeStep, Plan
from come.merge.scales import SpanScale
from come.merge.source_layers import KeptUnits, SourceLayers
from come.models.adapter import ModelAdapter
from come.models.layer_state import LayerState, changed, overlay
from come.models.layout import Block
from come.models.width import units_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def source_layers_of(
    adapter: ModelAdapter,
    layers: Sequence[int],
    operator: MergeOperator,
    norms: str,
    shares: Sequence[float],
    kept: KeptUnits,
    slot: int = 0,
) -> SourceLayers:
    """The tensors of `layers` that the operator reads, and the function that merges them.

    The model is not changed. `slot` is the index of the layer whose kind the merged layer has. If
    layers multiply the residual stream, the tensors are those of layers with the scale of the whole
    span (see `come.merge.scales`); a drop leaves the kept layer as it is.
    """
    states, roles = [adapter.layer_state(index) for index in layers], adapter.roles(layers[slot])
    if adapter.layer_layout(layers[slot]).scale and not operator.drops:
        scale = SpanScale.of(adapter, layers)
        for number, (index, state) in enumerate(zip(layers, states, strict=True)):
            own = scale.tensors(adapter, index, state, number)
            states[number] = changed(state, {name: partial(own.__getitem__, name) for name in own})
    if check_norms(norms) == "fold":
        states = [
            fold_norms(state, adapter.roles(index))
            for index, state in zip(layers, states, strict=True)
        ]
        roles = folded_roles(roles)
    return SourceLayers(
        states, lambda layers: operator.merge(layers, roles, shares, kept), shares, kept
    )


@torch.no_grad()
def apply_step(adapter: ModelAdapter, plan: Plan, step: MergeStep, operator: MergeOperator) -> None:
    """Applies `step`, the merge after the steps of `plan`, to the model in place."""
    block, places = plan.block, plan.places[step.first : step.last + 1]
    layers = range(step.first, step.last + 1) if block == "layer" else places
    sources = source_layers_of(
        adapter, layers, operator, plan.norms, step.shares, step.kept, step.slot
    )
    _check_solved(sources.state, step.solved.tensors, left=step.first == step.last)
    merged = overlay(sources.state, step.solved.tensors)
    if plan.norms == "fold":
        merged = balanced_norms(merged, adapter.roles(layers[step.slot]))
    left = units_left(adapter.layer_layout(layers[0]).unit_counts, step.kept)
    if left:
        assert step.first == step.last, "a layer is narrowed by a step of its own"
        adapter.narrow(step.first, merged, left)
    elif block == "layer":
        adapter.replace(step.first, step.last, merged, step.slot)
    else:
        for place, state in block_states(adapter, places, step.kept_layer, merged, block).items():
            adapter.write(place, state)
    if step.output_scale != 1:
        for index in range(step.first + 1, adapter.num_layers):
            adapter.scale_outputs(index, step.output_scale)


def _check_solved(state: LayerState, tensors: Mapping[str, Tensor], *, left: bool = False) -> None:
    """Raises ValueError unless solved tensors have names, shapes and dtypes of the layer's own.

    `left`: of a layer that may have fewer units, and tensors with fewer rows or columns.
    """
    for name, tensor in tensors.items():
        if name not in state:
            raise ValueError(f"the plan solves for {name}, which the layer does not have")
        own = tuple(state[name].shape)
        fits = len(own) == tensor.dim() and all(
            n <= m for n, m in zip(tensor.shape, own, strict=True)
        )
        if not (fits if left else own == tuple(tensor.shape)) or not tensor.is_floating_point():
            raise ValueError(
                f"the plan's {name} has the shape {tuple(tensor.shape)} in {tensor.dtype}, and the "
                f"layer's {own} in {state[name].dtype}"
            )


def block_states(
    adapter: ModelAdapter,
    places: Sequence[int],
    kept_layer: int | None,
    merged: LayerState,
    block: Block,
) -> dict[int, LayerState]:
    """The tensors of all layers that change when the blocks of layers `places` are merged.

    The first of these layers gets the merged block; in the others the block's output projection is
    zeroed. A drop leaves the kept block in its own layer.
    """
    states: dict[int, LayerState] = {place: adapter.zeroed(place, block) for place in places}
    home = places[kept_layer or 0]
    states[home] = adapter.layer_state(home)
    if kept_layer is None:
        own = {name: merged[name] for name in adapter.block_tensors(home, block)}
        states[home] = {**states[home], **own}
    return states


def apply(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """Rebuilds a plan's merged model from its base model in place, bit for bit.

    Args:
        plan: the plan of a finished or interrupted compression.
        model: the dense base model, in the dtype of the compression; changed in place.

    Returns:
        `model`, merged.

    Raises:
        ValueError: the model's type, layers or units differ from those of the plan's base model.
    """
    rebuild(plan, ModelAdapter(model))
    return model


def rebuild(plan: Plan, adapter: ModelAdapter) -> None:
    """As `apply`, for a model that has an adapter.

    The plan of an interrupted compression may leave layers with different numbers of units,
    which only this adapter knows.
    """
    found = (adapter.model.config.model_type, adapter.num_layers, dict(adapter.unit_counts))
    expected = (plan.base.model_type, plan.base.num_layers, dict(plan.base.units))
    if found != expected:
        raise ValueError(
            f"the plan is for {plan.base.name} (type, layers, units: {expected}); "
            f"this model has {found}"
        )
    operator = OPERATORS.create(plan.operator)
    done = replace(plan, steps=[])
    for step in plan.steps:
        apply_step(adapter, done, step, operator)
        done = done.with_step(step)
    if plan.dropped:
        for index in range(adapter.num_layers):
            zero_dropped(adapter, plan.dropped, index)
    write_downstream(adapter, plan)


def write_downstream(adapter: ModelAdapter, plan: Plan) -> dict[int, LayerState]:
    """Writes the tensors of the plan's downstream refit into the merged model.

    Returns:
        The previous values of these tensors, by layer.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in plan.downstream.tensors.items():
        place, _, name = key.partition("/")
        layers.setdefault(int(place), {})[name] = tensor
    before: dict[int, LayerState] = {}
    for index, tensors in layers.items():
        state = adapter.layer_state(index)
        _check_solved(state, tensors)
        before[index] = {name: state[name].clone() for name in tensors}
        adapter.write(index, tensors)
    return before
