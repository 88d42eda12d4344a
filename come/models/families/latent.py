"""Multi-head latent attention with a dense MLP or experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from come.models.families.experts import corrected_experts, routed, shared, summed
from come.models.families.mixers import latent_attention
from come.models.families.parts import FFN_NORM, Family, ffn, same_layers
from come.models.families.sparse import SparseRule, after_dense, listed, sparse_layers
from come.models.layout import Norm, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

Mixers = Callable[["PretrainedConfig"], Sublayer | Sequence[Sublayer]]
"""Reads from a configuration the mixer of all layers, or of each."""


def latent(config: PretrainedConfig, factor: float = 1.0, **others: Any) -> ModelLayout:
    """Latent attention, then a gated MLP; a constant may multiply the output of both."""
    mlp = ffn(config.intermediate_size, factor=factor)
    return same_layers(config, latent_attention(config, factor=factor), mlp, **others)


def minicpm3(config: PretrainedConfig) -> ModelLayout:
    """MiniCPM 3, whose outputs are scaled by its number of layers."""
    # Rounded, so that it does not change with the number of layers that a cut leaves.
    factor = round(config.scale_depth / config.num_hidden_layers**0.5, 9)
    return latent(config, factor, logit_scale=config.dim_model_base / config.hidden_size)


def deepseek(
    config: PretrainedConfig, sparse: SparseRule = listed, mixers: Mixers = latent_attention
) -> ModelLayout:
    """Latent attention or other mixers, then a gated MLP or experts."""
    mlp, experts = ffn(config.intermediate_size), corrected_experts(config)
    return sparse_layers(config, sparse(config), mixers(config), experts, mlp)


def deepseek_v2(config: PretrainedConfig) -> ModelLayout:
    """DeepSeek 2, whose router has no correction bias, and groups in its larger form only."""
    channels = config.moe_intermediate_size
    groups = config.n_group if config.topk_method == "group_limited_greedy" else 1
    experts = (
        routed(config.num_experts, channels, groups=groups),
        shared(channels * config.n_shared_experts, "mlp.shared_experts"),
    )
    mlp = ffn(config.intermediate_size)
    return sparse_layers(config, after_dense(config), latent_attention(config), experts, mlp)


def axk(config: PretrainedConfig, after: Norm | None = None) -> ModelLayout:
    """A.X K: as DeepSeek 3, but all experts are kept from one layer, together with their norm.

    Their sum has a norm in A.X K1, and the norms have gates on their outputs in A.X K2.
    """
    both = summed(corrected_experts(config), "mlp", FFN_NORM, after)
    mlp = ffn(config.intermediate_size)
    return sparse_layers(config, listed(config), latent_attention(config), (both,), mlp)


def glm_moe_dsa(config: PretrainedConfig) -> ModelLayout:
    """GLM 5, each layer of which picks the tokens that its attention reads.

    Raises:
        ValueError: a layer reads the tokens that an earlier one picked.
    """
    shared_picks = [i for i, kind in enumerate(config.indexer_types) if kind == "shared"]
    if shared_picks:
        raise ValueError(
            f"layer {shared_picks[0]} of this model reads the tokens that an earlier layer picked "
            "(indexer_types has 'shared'); supported are models that have only 'full'"
        )
    mlp, experts = ffn(config.intermediate_size), corrected_experts(config)
    mixer = latent_attention(config, returns=3)
    return sparse_layers(config, listed(config), mixer, experts, mlp, returns=2)


def dots3_note(config: PretrainedConfig) -> ModelLayout:
    """dots3-note, also with encoders of images and sound; windows have heads of another size."""
    text = config.get_text_config(decoder=True)
    mixers = [latent_attention(text.per_layer_config[i]) for i in range(text.num_hidden_layers)]
    experts = corrected_experts(text, channels=text.shared_experts_intermediate_size)
    return sparse_layers(text, listed(text), mixers, experts, ffn(text.intermediate_size))


FAMILIES: dict[str, Family] = {
    "axk1": partial(axk, after=Norm("mlp.post_mlp_layernorm")),
    "axk2": axk,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": partial(deepseek, sparse=after_dense),
    "deepseek_v32": deepseek,
    "dots3_note": dots3_note,
    "dots3_note_text": dots3_note,
    "glm4_moe_lite": deepseek,
    "glm_moe_dsa": glm_moe_dsa,
    "minicpm3": minicpm3,
    "youtu": latent,
}
