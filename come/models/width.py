"""Layers with fewer FFN channels or KV groups: description, modules, and configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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
KV_GROUP: Unit = "kv_group"
"""The units of attention that can be left out: a KV head with the query heads that read it."""
UNIT_NAMES: dict[Unit, str] = {CHANNEL: "FFN channels", KV_GROUP: "KV groups"}
"""Units that layers can lose, in words."""
ATTENTION_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
    *("gemma", "gemma2", "gemma3_text"),
)
"""Model types whose attention modules hold no number of heads, and whose `head_dim` is a key."""
CHANNEL_KEYS = (
    *("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "dff"),
    "shared_intermediate_size",
)
"""Keys of a configuration that may hold the number of FFN channels, or a multiple of it."""
_SIZES = {"in_features": 1, "out_features": 0, "nx": 0, "nf": 1}  # dimensions of a weight


def with_units(layout: LayerLayout, counts: Mapping[Unit, int]) -> LayerLayout:
    """The description of a layer with other numbers of units, by kind."""
    return replace(layout, sublayers=tuple(_narrowed(each, counts) for each in layout))


def _narrowed(sublayer: Sublayer, counts: Mapping[Unit, int]) -> Sublayer:
    if sublayer.unit not in counts:
        return sublayer
    count = counts[sublayer.unit]
    gates = (replace(gate, start=gate.start * count // sublayer.count) for gate in sublayer.gates)
    return replace(sublayer, count=count, gates=tuple(gates))


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
    expected = tuple(with_units(layout, {CHANNEL: channels}) for layout in layouts)
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


def groups_of(layouts: Sequence[LayerLayout]) -> int:
    """KV groups of every layer.

    Raises:
        ValueError: a layer has no attention of KV groups, or layers differ in their number.
    """
    without = [i for i, own in enumerate(layouts) if KV_GROUP not in own.unit_counts]
    counts = sorted({own.unit_counts.get(KV_GROUP, 0) for own in layouts})
    reason = ""
    if without:
        reason = (
            f"{len(without)} of this model's {len(layouts)} layers have no attention with separate "
            f"KV groups (the first is layer {without[0]})"
        )
    elif len(counts) > 1:
        reason = f"this model's layers have {', '.join(map(str, counts))} KV groups"
    if reason:
        raise ValueError(
            f"merge.width_attention keeps one number of KV groups in all layers, and {reason}; "
            "leave merge.width_attention out"
        )
    return counts[0]


def set_groups(config: PretrainedConfig, groups: int) -> None:
    """Changes a configuration so that all layers have this number of KV groups.

    Each keeps its query heads, and `head_dim` becomes explicit.

    Raises:
        ValueError: the model's type is not in `ATTENTION_TYPES`, or its configuration does not
            allow this number of heads.
    """
    layouts, own = layout_of(config).layers, config.get_text_config(decoder=True)
    count = groups_of(layouts)
    if config.model_type not in ATTENTION_TYPES:
        raise ValueError(
            f"merge.width_attention: in model type {config.model_type!r} the size of a head may "
            "follow from the number of heads; supported are "
            f"{', '.join(ATTENTION_TYPES)}; leave merge.width_attention out"
        )
    heads = own.num_attention_heads
    values = {
        "head_dim": getattr(own, "head_dim", None) or own.hidden_size // heads,
        "num_attention_heads": heads // count * groups,
        "num_key_value_heads": groups,
    }
    expected = tuple(with_units(layout, {KV_GROUP: groups}) for layout in layouts)
    if not _allows(config, values, expected):
        allowed = [
            str(n)
            for n in range(1, count)
            if _allows(
                config,
                values | {"num_attention_heads": heads // count * n, "num_key_value_heads": n},
                tuple(with_units(layout, {KV_GROUP: n}) for layout in layouts),
            )
        ]
        raise ValueError(
            f"merge.width_attention keeps {groups} of {count} KV groups, and the configuration of "
            f"model type {config.model_type!r} does not allow {values['num_attention_heads']} "
            f"heads; it allows {', '.join(allowed) or 'no other number of'} KV groups; choose "
            "another merge.width_attention"
        )
    for key, value in values.items():
        setattr(own, key, value)


def _allows(
    config: PretrainedConfig, values: Mapping[str, int], expected: tuple[LayerLayout, ...]
) -> bool:
    """Whether a configuration with these values can be loaded, and describes such layers."""
    probe = copy.deepcopy(config)
    for key, value in values.items():
        setattr(probe.get_text_config(decoder=True), key, value)
    try:
        loaded = type(probe).from_dict(probe.to_dict())
    except Exception:  # the checks of a type raise errors of their own
        return False
    return layout_of(loaded).layers == expected


SETTERS: dict[Unit, Callable[[PretrainedConfig, int], None]] = {
    KV_GROUP: set_groups,
    CHANNEL: set_channels,
}
"""How a configuration gets another number of units, by kind."""


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


def units_left(
    counts: Mapping[Unit, int], kept: Mapping[Unit, Sequence[Sequence[int]]]
) -> dict[Unit, int]:
    """Numbers of kept KV groups and FFN channels where they are fewer than a layer has, by kind.

    Args:
        counts: units of a layer, by kind.
        kept: kept units of every layer of a span, by kind.
    """
    left = {unit: sum(len(units) for units in kept.get(unit, ())) for unit in SETTERS}
    return {unit: n for unit, n in left.items() if 0 < n < counts.get(unit, 0)}
