"""Removes decoder layers, and updates layer indices and configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


Span = list[int]
"""The original layers that were merged into one layer of the current model."""

# Per-layer configuration keys, by the kind of their value.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER_INDEX_LISTS = ("mlp_only_layers",)
LAYER_THRESHOLDS = ("max_window_layers", "first_k_dense_replace")
# Other lists, whose length may equal the number of layers by coincidence.
OTHER_LISTS = ("architectures", "eos_token_id", "bos_token_id", "suppress_tokens")


def check_layer_config(config: PretrainedConfig) -> None:
    """Rejects a configuration with per-layer entries that removing layers cannot update.

    Raises:
        ValueError: there is an unknown list with one entry per layer, or the layers are of several
            kinds.
    """
    count = config.num_hidden_layers
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *OTHER_LISTS}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and count > 1 and key not in known:
            raise ValueError(
                f"config.{key} has one entry for each of the {count} layers, and it is not known "
                f"how to keep it in step when layers are merged; known are "
                f"{', '.join(PER_LAYER_LISTS)}"
            )
    for key in PER_LAYER_LISTS:
        kinds = sorted({str(kind) for kind in getattr(config, key, None) or []})
        if len(kinds) > 1:
            raise ValueError(
                f"config.{key} mixes {', '.join(kinds)}: merging layers of different kinds is "
                "not supported"
            )


def reindex_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Updates all per-layer keys of `config` for the remaining layers `kept` (old indices)."""
    count = config.num_hidden_layers
    for key in PER_LAYER_LISTS:
        value = getattr(config, key, None)
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[i] for i in kept])
    for key in LAYER_INDEX_LISTS:
        value = getattr(config, key, None)
        if value:
            setattr(config, key, [new for new, old in enumerate(kept) if old in value])
    for key in LAYER_THRESHOLDS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            setattr(config, key, sum(old < value for old in kept))
    config.num_hidden_layers = len(kept)


def remove_layers(layers: nn.ModuleList, config: PretrainedConfig, first: int, last: int) -> None:
    """Removes layers first..last (inclusive) from a model, and updates its configuration.

    Args:
        layers: the decoder layers of the model.
        config: the model's configuration, updated in place.
        first: first layer to remove.
        last: last layer to remove.
    """
    assert 0 < first <= last < len(layers) == config.num_hidden_layers
    reindex_config(config, [i for i in range(len(layers)) if not first <= i <= last])
    del layers[first : last + 1]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - not declared by nn.Module
