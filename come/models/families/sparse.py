"""Models in which all or some layers have experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from come.models.layout import LayerLayout, ModelLayout, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Sparse = Sequence[bool]
"""For every layer, whether it has experts."""


def all_sparse(config: PretrainedConfig) -> Sparse:
    """All layers."""
    return [True] * config.num_hidden_layers


def after_dense(config: PretrainedConfig) -> Sparse:
    """All layers but the first ones, by `first_k_dense_replace`."""
    return [i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)]


def listed(config: PretrainedConfig) -> Sparse:
    """By `mlp_layer_types`."""
    return [kind == "sparse" for kind in config.mlp_layer_types]


def in_steps(config: PretrainedConfig) -> Sparse:
    """Every `decoder_sparse_step`-th layer, unless it is in `mlp_only_layers`."""
    return [
        i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]


def layer_kind(config: PretrainedConfig, index: int) -> str:
    """What distinguishes a layer: its window, and its rotary embeddings if each has its own."""
    found = []
    for key in ("layer_types", "layer_rope_theta", "no_rope_layers"):
        values = getattr(config, key, None)
        if values:
            found.append(str(values[index]))
    return ", ".join(found)


def sparse_layers(
    config: PretrainedConfig,
    sparse: Sparse,
    attention: Sublayer | Callable[[int], Sublayer],
    experts: tuple[Sublayer, ...],
    dense: Sublayer | None = None,
    **others: Any,
) -> ModelLayout:
    """A model of layers with experts, and of others with one MLP.

    Args:
        config: the model's configuration.
        sparse: which layers have experts.
        attention: the attention of all layers, or of each by its index.
        experts: the routed experts, and the shared one if there is one.
        dense: the MLP of the other layers.
        others: further attributes of the model.
    """
    layers = []
    for index, has_experts in enumerate(sparse):
        own = attention if isinstance(attention, Sublayer) else attention(index)
        assert has_experts or dense is not None
        ffns = experts if has_experts or dense is None else (dense,)
        layers.append(LayerLayout((own, *ffns), layer_kind(config, index)))
    return ModelLayout(tuple(layers), **others)
