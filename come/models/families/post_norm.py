"""Decoders with norms after their sublayers, with or without norms before them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.changes import opaque, wrapped
from come.models.families.parts import HEAD_NORMS, Family, attention, ffn, fused_ffn, same_layers
from come.models.layout import LayerLayout, ModelLayout, Norm, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GEMMA4_REFUSED = {
    "hidden_size_per_layer_input": "have inputs of their own",
    "num_kv_shared_layers": "share keys and values",
    "enable_moe_block": "add experts to their MLP before one norm",
}
"""Keys of Gemma 4 that are refused unless they are 0 or false, and what they mean."""


def gemma2(config: PretrainedConfig, **others: Any) -> ModelLayout:
    """Gemma 2: norms before and after both sublayers, with the scale 1 + weight."""
    mixer = attention(
        config,
        norm=Norm("input_layernorm", 1.0),
        post_norm=Norm("post_attention_layernorm", 1.0),
        **others,
    )
    mlp = ffn(
        config.intermediate_size,
        norm=Norm("pre_feedforward_layernorm", 1.0),
        post_norm=Norm("post_feedforward_layernorm", 1.0),
    )
    return same_layers(config, mixer, mlp, begin_token=True)


def gemma3(config: PretrainedConfig) -> ModelLayout:
    """Gemma 3: as Gemma 2, with norms over each head."""
    return gemma2(config, shared=HEAD_NORMS)


def gemma3_with_images(config: PretrainedConfig) -> ModelLayout:
    """Gemma 3 with images: its head has no soft bound, whatever the configuration says."""
    return replace(wrapped(gemma3, "gemma3_text", "model.language_model")(config), logit_cap=0.0)


def gemma4(config: PretrainedConfig) -> ModelLayout:
    """Gemma 4: as Gemma 3, with a scale of every layer, and other heads in full attention.

    Raises:
        ValueError: layers have inputs of their own, experts, or keys and values of other layers, or
            read later tokens.
    """
    for key, what in GEMMA4_REFUSED.items():
        if value := getattr(config, key, None):
            raise ValueError(
                f"the layers of this Gemma 4 {what} (config.{key}={value}), which is not supported"
            )
    if config.use_bidirectional_attention == "all":
        raise ValueError(
            "this Gemma 4 also reads later tokens (config.use_bidirectional_attention=all), which "
            "is not supported"
        )
    mlp = ffn(
        config.intermediate_size,
        norm=Norm("pre_feedforward_layernorm"),
        post_norm=Norm("post_feedforward_layernorm"),
    )
    base = same_layers(config, mlp, begin_token=True)
    layers = (
        LayerLayout((_gemma4_mixer(config, index), mlp), own.kind, scale="layer_scalar")
        for index, own in enumerate(base.layers)
    )
    return replace(base, layers=tuple(layers))


def _gemma4_mixer(config: PretrainedConfig, index: int) -> Sublayer:
    """The attention of one layer, whose keys may also be its values if it is full attention."""
    mixer = attention(
        config.per_layer_config[index],
        post_norm=Norm("post_attention_layernorm"),
        shared=HEAD_NORMS,
    )
    if config.attention_k_eq_v and config.layer_types[index] != "sliding_attention":
        queries, keys, _ = mixer.inputs
        return replace(mixer, inputs=(queries, keys))
    return mixer


def glm4(config: PretrainedConfig) -> ModelLayout:
    """GLM-4 (0414): four norms a layer, and gate and up projections in one module."""
    return same_layers(
        config,
        attention(config, post_norm=Norm("post_self_attn_layernorm")),
        fused_ffn(config.intermediate_size, post_norm=Norm("post_mlp_layernorm")),
    )


def hyperclovax(config: PretrainedConfig) -> ModelLayout:
    """HyperCLOVA X: multipliers, and norms after the sublayers unless they are switched off."""
    first, second = (
        (Norm("post_norm1"), Norm("post_norm2")) if config.use_post_norm else (None, None)
    )
    factor = config.residual_multiplier
    return same_layers(
        config,
        attention(config, post_norm=first, factor=factor),
        ffn(config.intermediate_size, post_norm=second, factor=factor),
        logit_scale=config.logits_scaling,
    )


def exaone4(config: PretrainedConfig) -> ModelLayout:
    """EXAONE 4: norms after the sublayers only, and over each head."""
    return same_layers(config, _mixer(config, shared=HEAD_NORMS), _mlp(config))


def olmo2(config: PretrainedConfig) -> ModelLayout:
    """OLMo 2 and 3: norms after the sublayers only.

    Queries and keys are normalised over all heads together, which couples the heads, so attention
    is kept from one layer as a whole.
    """
    return same_layers(config, opaque(_mixer(config), "self_attn"), _mlp(config))


def _mixer(config: PretrainedConfig, **others: Any) -> Sublayer:
    return attention(config, norm=None, post_norm=Norm("post_attention_layernorm"), **others)


def _mlp(config: PretrainedConfig) -> Sublayer:
    post_norm = Norm("post_feedforward_layernorm")
    return ffn(config.intermediate_size, norm=None, post_norm=post_norm)


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3": gemma3_with_images,
    "gemma3_text": gemma3,
    "gemma4": wrapped(gemma4, "gemma4_text", "model.language_model"),
    "gemma4_text": gemma4,
    "gemma4_unified": wrapped(gemma4, "gemma4_unified_text", "model.language_model"),
    "gemma4_unified_text": gemma4,
    "glm4": glm4,
    "hyperclovax": hyperclovax,
    "exaone4": exaone4,
    "olmo2": olmo2,
    "olmo3": olmo2,
}
