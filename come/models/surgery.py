"""Removes decoder layers, and updates layer indices and configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


Span = list[int]
"""The original layers that were merged into one layer of the current model."""

# Per-layer configuration keys, by the kind of their value.
PER_LAYER_LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers"),
    *("indexer_types", "layer_rope_theta", "num_attention_heads_per_layer", "intermediate_size"),
    "activation_sparsity_pattern",
)
LAYER_INDEX_LISTS = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"),
    "cross_attention_layers",
)
# Lists of layers counted from 1, in a mapping.
COUNTED_FROM_ONE = {"linear_attn_config": ("full_attn_layers", "kda_layers")}
LAYER_THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
LAYER_COUNTS = ("num_blocks", "n_layer")  # second names of the number of layers
CYCLES = ("block_types", "_block_types")  # lists that are repeated over the layers
# Factors of every sublayer's output, divided by the root of the number of layers.
DEPTH_SCALES = ("scale_depth",)
# Other lists, whose length may equal the number of layers by coincidence.
OTHER_LISTS = (
    *("architectures", "eos_token_id", "bos_token_id", "suppress_tokens", "time_step_limit"),
    *("mlp_multipliers", "ssm_multipliers", "mtp_layers_block_type"),
)

# Kinds of layer whose cache does not count tokens.
UNCOUNTED = {"linear_attention", "conv", "mlp", "moe"}
# The kind that transformers gives the last layer when it reads a configuration, by model type.
LAST_KINDS = dict.fromkeys(("gemma4_text", "gemma4_unified_text"), "full_attention")

_INDICES = ("layer_idx", "layer_id", "layer_number")  # of modules that know their own layer


def check_layer_config(config: PretrainedConfig) -> None:
    """Rejects a configuration with per-layer entries that removing layers cannot update.

    Raises:
        ValueError: there is an unknown list with one entry per layer.
    """
    count = config.num_hidden_layers
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *CYCLES, *OTHER_LISTS}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and count > 1 and key not in known:
            raise ValueError(
                f"config.{key} has one entry for each of the {count} layers, and it is not known "
                f"how to keep it in step when layers are merged; known are "
                f"{', '.join((*PER_LAYER_LISTS, *LAYER_INDEX_LISTS))}"
            )


def needed_layers(config: PretrainedConfig) -> tuple[bool, ...]:
    """By layer, whether it is of the kind of which one must be left; empty if all are, or none is.

    Of a model with several kinds of layer, one with attention must be left, because transformers
    counts the tokens of its cache there. In some types, the last layer must be of one kind.
    """
    kinds = getattr(config, "layer_types", None) or []
    last = LAST_KINDS.get(config.model_type)
    found = tuple(kind == last if last else kind not in UNCOUNTED for kind in kinds)
    return found if any(found) and not all(found) else ()


def needs_last(config: PretrainedConfig) -> bool:
    """Whether the last layer must be of the kind of `needed_layers`."""
    return config.model_type in LAST_KINDS


def check_removal(config: PretrainedConfig, removed: Sequence[int]) -> None:
    """Rejects a cut after which transformers could not generate with a cache, or load the model.

    Raises:
        ValueError: no layer with attention would be left of several kinds of layer, or the last one
            would be of a kind that transformers replaces.
    """
    needed = [index for index, own in enumerate(needed_layers(config)) if own]
    left = [index for index in range(config.num_hidden_layers) if index not in removed]
    if needed and needs_last(config):
        if left[-1] not in needed:
            kind = LAST_KINDS[config.model_type]
            raise ValueError(
                f"removing layers {', '.join(map(str, removed))} makes layer {left[-1]} the last "
                f"one, and transformers loads {config.model_type} with a last layer of the kind "
                f"{kind}; keep layer {needed[-1]} and those of other kinds before it"
            )
    elif needed and set(needed) <= set(removed):
        raise ValueError(
            f"removing layers {', '.join(map(str, removed))} leaves no layer with attention, and "
            "transformers counts the tokens of a cache in such a layer; keep one of layers "
            f"{', '.join(map(str, needed))}"
        )


def reindex_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Updates all per-layer keys of `config` for the remaining layers `kept` (old indices)."""
    count = config.num_hidden_layers
    differing = config.to_dict().get("per_layer_config", {})
    _list_dense_layers(config)
    for key in PER_LAYER_LISTS:
        value = getattr(config, key, None)
        if isinstance(value, list) and len(value) == count and not _derived(config, key):
            setattr(config, key, [value[i] for i in kept])
    for key in LAYER_COUNTS:
        if getattr(config, key, None) == count:
            setattr(config, key, len(kept))
    for key in CYCLES:
        value = getattr(config, key, None)
        if value:
            setattr(config, key, [value[i % len(value)] for i in kept])
    for key in DEPTH_SCALES:
        value = getattr(config, key, None)
        if value:
            setattr(config, key, value * math.sqrt(len(kept) / count))
    if getattr(config, "attention_types", None) and hasattr(config, "attention_layers"):
        config.attention_types = [[list(config.attention_layers), 1]]  # GPT-Neo's kinds, repeated
    for key in LAYER_INDEX_LISTS:
        value = getattr(config, key, None)
        if value:
            setattr(config, key, [new for new, old in enumerate(kept) if old in value])
    for key, names in COUNTED_FROM_ONE.items():
        value = getattr(config, key, None) or {}
        lists = {name: value[name] for name in names if name in value}
        if lists:
            left = {
                name: [new for new, old in enumerate(kept, start=1) if old + 1 in layers]
                for name, layers in lists.items()
            }
            setattr(config, key, value | left)
    for key in LAYER_THRESHOLDS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            setattr(config, key, sum(old < value for old in kept))
    if getattr(config, "moe_layer_interval", 0):
        first, last = config.moe_layer_start_index, config.moe_layer_end_index
        sparse = [new for new, old in enumerate(kept) if first <= old <= last]
        config.moe_layer_start_index = sparse[0] if sparse else len(kept)
        config.moe_layer_end_index = sparse[-1] if sparse else len(kept)
    config.num_hidden_layers = len(kept)
    if differing:  # values that differ between layers, by the layer's index
        own = {int(index): values for index, values in differing.items()}
        config.per_layer_config = {new: own[old] for new, old in enumerate(kept) if old in own}


def _derived(config: PretrainedConfig, key: str) -> bool:
    """Whether a key is computed from others and cannot be set."""
    name = config.attribute_map.get(key, key)
    computed = getattr(type(config), name, None)
    return isinstance(computed, property) and computed.fset is None


def _list_dense_layers(config: PretrainedConfig) -> None:
    """Replaces a period of layers with experts by a list of the layers without."""
    step = getattr(config, "decoder_sparse_step", 1)
    if step > 1:
        dense = [i for i in range(config.num_hidden_layers) if (i + 1) % step]
        config.mlp_only_layers = sorted({*dense, *(config.mlp_only_layers or ())})
        config.decoder_sparse_step = 1


def remove_layers(layers: nn.ModuleList, config: PretrainedConfig, removed: Sequence[int]) -> None:
    """Removes layers from a model, and updates its configuration in place.

    Args:
        layers: the decoder layers of the model.
        config: the model's configuration.
        removed: indices of the layers to remove, ascending.
    """
    assert len(layers) == config.num_hidden_layers > len(removed)
    reindex_config(config, [i for i in range(len(layers)) if i not in removed])
    for index in reversed(removed):
        del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            for name in _INDICES:
                if hasattr(module, name):
                    setattr(module, name, index)
