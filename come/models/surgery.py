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
PER_LAYER_LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers"),
    *("indexer_types", "layer_rope_theta", "num_attention_heads_per_layer", "intermediate_size"),
    "activation_sparsity_pattern",
)
LAYER_INDEX_LISTS = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"),
    "cross_attention_layers",
)
LAYER_THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# Other lists, whose length may equal the number of layers by coincidence.
OTHER_LISTS = ("architectures", "eos_token_id", "bos_token_id", "suppress_tokens")

_INDICES = ("layer_idx", "layer_id", "layer_number")  # of modules that know their own layer


def check_layer_config(config: PretrainedConfig) -> None:
    """Rejects a configuration with per-layer entries that removing layers cannot update.

    Raises:
        ValueError: there is an unknown list with one entry per layer.
    """
    count = config.num_hidden_layers
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *OTHER_LISTS}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and count > 1 and key not in known:
            raise ValueError(
                f"config.{key} has one entry for each of the {count} layers, and it is not known "
                f"how to keep it in step when layers are merged; known are "
                f"{', '.join((*PER_LAYER_LISTS, *LAYER_INDEX_LISTS))}"
            )


def reindex_config(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Updates all per-layer keys of `config` for the remaining layers `kept` (old indices)."""
    count = config.num_hidden_layers
    _list_dense_layers(config)
    for key in PER_LAYER_LISTS:
        value = getattr(config, key, None)
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[i] for i in kept])
    if getattr(config, "attention_types", None) and hasattr(config, "attention_layers"):
        config.attention_types = [[list(config.attention_layers), 1]]  # GPT-Neo's kinds, repeated
    for key in LAYER_INDEX_LISTS:
        value = getattr(config, key, None)
        if value:
            setattr(config, key, [new for new, old in enumerate(kept) if old in value])
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
