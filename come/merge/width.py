"""How many FFN channels and KV groups layers keep, and whether method and model allow it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from come.merge.combination import Combination
from come.models.layout import LayerLayout, Unit
from come.models.width import (
    CHANNEL,
    KV_GROUP,
    channels_of,
    groups_of,
    set_channels,
    set_groups,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def narrows(method: Combination) -> bool:
    """Whether layers lose FFN channels or KV groups."""
    return method.width < 1 or method.width_attention < 1


def width_setting(method: Combination) -> str:
    """The setting by which layers lose units, for messages."""
    if method.width < 1:
        return f"merge.width={method.width}"
    return f"merge.width_attention={method.width_attention}"


def check_width(method: Combination) -> None:
    """Raises ValueError if the components of a method cannot make layers narrower."""
    if not narrows(method):
        return
    shown, reason = width_setting(method), ""
    if not method.operator.uses_units:
        reason = (
            f"keeps some of a layer's units, and merge.operator={method.operator.name} takes "
            "layers as a whole; choose merge.operator=concat"
        )
    elif method.block != "layer":
        reason = (
            "narrows the layers of the merged model, and merge.sublayers="
            f"{list(method.sublayers)} leaves layers without a sublayer; leave one of them out"
        )
    elif method.refit.downstream is not None:
        reason = (
            "makes a step of every layer, with its own refit, and merge.refit.downstream="
            f"{method.refit.downstream} refits layers after the last merge; leave one of them out"
        )
    if reason:
        raise ValueError(f"{shown} {reason}")


def check_depth(method: Combination, num_layers: int, target: int) -> None:
    """Raises ValueError if a method that only narrows layers should also remove some."""
    if method.refit.narrows_only and target != num_layers:
        raise ValueError(
            f"merge.refit={method.refit.name} narrows layers and merges none, and "
            f"merge.target_layers={target} is not the model's depth, {num_layers}; leave "
            "merge.target_layers out"
        )


def kept_channels(
    method: Combination, config: PretrainedConfig, layouts: Sequence[LayerLayout]
) -> int:
    """FFN channels of every layer of the narrower model; 0 if `merge.width` keeps all of them.

    The share of the channels is rounded to the nearest multiple of `merge.width_multiple`, at least
    one.

    Args:
        method: the merging method.
        config: configuration of the dense model.
        layouts: its layers.

    Raises:
        ValueError: the model's layers cannot be narrowed, or rounding keeps all channels.
    """
    if method.width == 1:
        return 0
    full, multiple = channels_of(layouts), method.width_multiple
    kept = max(1, round(method.width * full / multiple)) * multiple
    if kept >= full:
        raise ValueError(
            f"merge.width={method.width} keeps all {full} FFN channels, because the number is "
            f"rounded to a multiple of {multiple}; choose a smaller merge.width or "
            "merge.width_multiple"
        )
    set_channels(copy.deepcopy(config), kept)
    return kept


def kept_groups(
    method: Combination, config: PretrainedConfig, layouts: Sequence[LayerLayout]
) -> int:
    """KV groups of every layer of the narrower model; 0 if `merge.width_attention` keeps all.

    The share of the groups is rounded to the nearest whole number, at least one. Arguments are
    those of `kept_channels`.

    Raises:
        ValueError: the model's layers cannot lose groups, or rounding keeps all of them.
    """
    if method.width_attention == 1:
        return 0
    full = groups_of(layouts)
    kept = max(1, round(method.width_attention * full))
    if kept >= full:
        raise ValueError(
            f"merge.width_attention={method.width_attention} keeps all {full} KV groups; choose "
            "a smaller merge.width_attention, or leave it out"
        )
    set_groups(copy.deepcopy(config), kept)
    return kept


def kept_units(
    method: Combination, config: PretrainedConfig, layouts: Sequence[LayerLayout]
) -> dict[Unit, int]:
    """Units of every layer of the narrower model, of the kinds that it has fewer of.

    Arguments and errors are those of `kept_channels` and `kept_groups`.
    """
    found = {
        KV_GROUP: kept_groups(method, config, layouts),
        CHANNEL: kept_channels(method, config, layouts),
    }
    return {unit: count for unit, count in found.items() if count}
