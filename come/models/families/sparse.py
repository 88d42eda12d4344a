"""Models in which all or some layers have experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from come.models.families.parts import layer_kind
from come.models.layout import LayerLayout, ModelLayout, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Sparse = Sequence[bool]
"""For every layer, whether it has experts."""
SparseRule = Callable[["PretrainedConfig"], Sparse]
"""Reads from a configuration which layers have experts."""


def all_sparse(config: PretrainedConfig) -> Sparse:
    """All layers."""
    return [True] * config.num_hidden_layers


def after_dense(config: PretrainedConfig, key: str = "first_k_dense_replace") -> Sparse:
    """All layers but the first ones, whose number the configuration has under a key."""
    return [i >= getattr(config, key) for i in range(config.num_hidden_layers)]


def listed(config: PretrainedConfig) -> Sparse:
    """By `mlp_layer_types`."""
    return [kind == "sparse" for kind in config.mlp_layer_types]


def in_steps(config: PretrainedConfig) -> Sparse:
    """Every `decoder_sparse_step`-th layer, unless it is in `mlp_only_layers`."""
    return [
        i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]


def sparse_layers(
    config: PretrainedConfig,
    sparse: Sparse,
    attention: Sublayer | Sequence[Sublayer],
    experts: tuple[Sublayer, ...],
    dense: Sublayer | None = None,
    **others: Any,
) -> ModelLayout:
    """A model of layers with experts, and of others with one MLP.

    Args:
        config: the model's configuration.
        sparse: which layers have experts.
        attention: the attention or other mixer of all layers, or of each.
        experts: the routed experts, and the shared one if there is one.
        dense: the MLP of the other layers.
        others: further attributes of the model.
    """
    mixers = [attention] * len(sparse) if isinstance(attention, Sublayer) else attention
    layers = []
    for index, (own, has_experts) in enumerate(zip(mixers, sparse, strict=True)):
        assert has_experts or dense is not None
        ffns = experts if has_experts or dense is None else (dense,)
        layers.append(LayerLayout((own, *ffns), layer_kind(config, index)))
    return ModelLayout(tuple(layers), **others)
