"""Layers with fewer FFN channels: their description, their modules, and the configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from come.models.families import layout_of
from come.models.layer_state import LayerState
from come.models.layout import LayerLayout, Sublayer, Unit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHANNEL: Unit = "channel"
"""The units of an FFN that can be narrowed."""
CHANNEL_KEYS = (
    *("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "dff"),
    "shared_intermediate_size",
)
"""Keys of a configuration that may hold the number of FFN channels, or a multiple of it."""
_SIZES = {"in_features": 1, "out_features": 0, "nx": 0, "nf": 1}  # dimensions of a weight


def with_channels(layout: LayerLayout, channels: int) -> LayerLayout:
    """The description of a layer with another number of FFN channels."""
    return replace(layout, sublayers=tuple(_narrowed(each, channels) for each in layout))


def _narrowed(sublayer: Sublayer, channels: int) -> Sublayer:
    if sublayer.unit != CHANNEL:
        return sublayer
    gates = (
        replace(gate, start=gate.start * channels // sublayer.count) for gate in sublayer.gates
    )
    return replace(sublayer, count=channels, gates=tuple(gates))


def channels_of(layouts: Sequence[LayerLayout]) -> int:
    """FFN channels of every layer.

    Raises:
        ValueError: a layer has no dense FFN with channels, or layers differ in their number.
    """
    without = [i for i, own in enumerate(layouts) if own.routed or CHANNEL not in own.unit_counts]
    if without:
        raise ValueError(
            f"merge.width narrows the dense FFN of every layer, and {len(without)} of this model's "
            f"{len(layouts)} layers have experts, or no FFN with separate channels (the first is "
            f"layer {without[0]}); leave merge.width out"
        )
    counts = sorted({layout.unit_counts[CHANNEL] for layout in layouts})
    if len(counts) > 1:
        raise ValueError(
            "merge.width needs one number of FFN channels for all layers, and this model has "
            f"{', '.join(map(str, counts))}; leave merge.width out"
        )
    return counts[0]


def set_channels(config: PretrainedConfig, channels: int) -> None:
    """Changes a configuration so that all layers have this number of FFN channels.

    The key is found by its effect: with its new value, the family describes the same layers with
    fewer channels.

    Raises:
        ValueError: no key of the configuration has this effect, and no other.
    """
    layouts = layout_of(config).layers
    count = channels_of(layouts)
    expected = tuple(with_channels(layout, channels) for layout in layouts)
    for key in CHANNEL_KEYS:
        own = config.get_text_config(decoder=True)
        before = getattr(own, key, None)
        if not hasattr(own, key) or not isinstance(before, int | None):
            continue
        value = channels if before is None else before * channels // count
        probe = copy.deepcopy(config)
        setattr(probe.get_text_config(decoder=True), key, value)
        if layout_of(probe).layers == expected:
            setattr(own, key, value)
            return
    raise ValueError(
        f"merge.width: the configuration of model type {config.model_type!r} has no single number "
        "of FFN channels that could be smaller; leave merge.width out"
    )


@torch.no_grad()
def resize(layer: nn.Module, state: LayerState) -> None:
    """Gives the parameters of a layer the shapes of `state`; changed ones have no values yet."""
    for name, parameter in list(layer.named_parameters()):
        shape = state[name].shape
        if parameter.shape != shape:
            owner, _, leaf = name.rpartition(".")
            blank = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            changed = nn.Parameter(blank, parameter.requires_grad)
            setattr(layer.get_submodule(owner), leaf, changed)
            record_sizes(layer, name)


def record_sizes(layer: nn.Module, name: str) -> None:
    """Sets the sizes that a linear map has as attributes to those of its parameter `name`."""
    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    for key, axis in _SIZES.items():
        if leaf == "weight" and hasattr(module, key):
            setattr(module, key, layer.get_parameter(name).shape[axis])


def channels_left(counts: Mapping[Unit, int], kept: Mapping[Unit, Sequence[Sequence[int]]]) -> int:
    """Number of kept FFN channels if they are fewer than a layer has; otherwise 0.

    Args:
        counts: units of a layer, by kind.
        kept: kept units of every layer of a span, by kind.
    """
    left = sum(len(units) for units in kept.get(CHANNEL, ()))
    return left if 0 < left < counts.get(CHANNEL, 0) else 0
