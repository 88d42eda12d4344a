"""How many FFN channels `merge.width` keeps, and whether a method and a model allow it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from come.merge.combination import Combination
from come.models.layout import LayerLayout
from come.models.width import channels_of, set_channels

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_width(method: Combination) -> None:
    """Raises ValueError if the components of a method cannot make layers narrower."""
    if method.width == 1:
        return
    shown, reason = f"merge.width={method.width}", ""
    if not method.operator.uses_units:
        reason = (
            f"keeps some of a layer's channels, and merge.operator={method.operator.name} takes "
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
