"""Decoders with norms after their sublayers, with or without norms before them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.parts import Family, attention, ffn, kv_groups
from come.models.layout import Gate, LayerLayout, ModelLayout, Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def gemma2(config: PretrainedConfig) -> ModelLayout:
    """Gemma 2: norms before and after both sublayers, with the scale 1 + weight."""
    return _sandwich(config, logit_cap=config.final_logit_softcapping)


def gemma3(config: PretrainedConfig) -> ModelLayout:
    """Gemma 3: as Gemma 2, with norms over each head."""
    cap = config.final_logit_softcapping
    return _sandwich(config, shared=HEAD_NORMS, logit_cap=cap)


def gemma3_wrapper(config: PretrainedConfig) -> ModelLayout:
    """The text model of Gemma 3 with images, whose head has no soft bound."""
    text = _sandwich(config.get_text_config(), shared=HEAD_NORMS)
    stack = "model.language_model.layers"
    return replace(text, stack=stack, final_norm="model.language_model.norm")


def _sandwich(config: PretrainedConfig, shared: tuple[str, ...] = (), **others: Any) -> ModelLayout:
    """Four norms a layer; sliding windows in some of the layers."""
    sublayers = (
        attention(
            config,
            norm=Norm("input_layernorm", 1.0),
            post_norm=Norm("post_attention_layernorm", 1.0),
            shared=shared,
        ),
        ffn(
            config.intermediate_size,
            norm=Norm("pre_feedforward_layernorm", 1.0),
            post_norm=Norm("post_feedforward_layernorm", 1.0),
        ),
    )
    return ModelLayout(_of_kinds(config, sublayers), begin_token=True, **others)


def glm4(config: PretrainedConfig) -> ModelLayout:
    """GLM-4 (0414): four norms a layer, and gate and up projections in one module."""
    channels = config.intermediate_size
    sublayers = (
        attention(config, post_norm=Norm("post_self_attn_layernorm")),
        replace(
            ffn(channels, post_norm=Norm("post_mlp_layernorm")),
            inputs=(Rows("mlp.gate_up_proj", (1, 1)),),
            gates=(Gate("mlp.gate_up_proj"), Gate("mlp.gate_up_proj", channels)),
        ),
    )
    return ModelLayout((LayerLayout(sublayers),) * config.num_hidden_layers)


def hyperclovax(config: PretrainedConfig) -> ModelLayout:
    """HyperCLOVA X: multipliers, and norms after the sublayers unless they are switched off."""
    first, second = (
        (Norm("post_norm1"), Norm("post_norm2")) if config.use_post_norm else (None, None)
    )
    factor = config.residual_multiplier
    sublayers = (
        attention(config, post_norm=first, factor=factor),
        ffn(config.intermediate_size, post_norm=second, factor=factor),
    )
    layers = (LayerLayout(sublayers),) * config.num_hidden_layers
    return ModelLayout(layers, logit_scale=config.logits_scaling)


def exaone4(config: PretrainedConfig) -> ModelLayout:
    """EXAONE 4: norms after the sublayers only, and over each head."""
    mixer = attention(
        config, norm=None, post_norm=Norm("post_attention_layernorm"), shared=HEAD_NORMS
    )
    return ModelLayout(_of_kinds(config, (mixer, _post_normed_ffn(config))))


def olmo2(config: PretrainedConfig) -> ModelLayout:
    """OLMo 2 and 3: norms after the sublayers only.

    Queries and keys are normalised over all heads together, which couples the heads, so attention
    is kept from one layer as a whole.
    """
    groups, queries, _ = kv_groups(config)
    mixer = Sublayer(
        name="attention",
        kind="attention",
        unit="mixer",
        count=1,
        norm=None,
        inputs=(Rows("self_attn"),),
        output="self_attn.o_proj",
        columns=groups * queries,
        post_norm=Norm("post_attention_layernorm"),
        silenced=(("self_attn", 2),),
        opaque=True,
    )
    return ModelLayout(_of_kinds(config, (mixer, _post_normed_ffn(config))))


def _post_normed_ffn(config: PretrainedConfig) -> Sublayer:
    post_norm = Norm("post_feedforward_layernorm")
    return ffn(config.intermediate_size, norm=None, post_norm=post_norm)


def _of_kinds(config: PretrainedConfig, sublayers: tuple[Sublayer, ...]) -> tuple[LayerLayout, ...]:
    """Layers with the same tensors that differ in their windows or position embeddings."""
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return tuple(LayerLayout(sublayers, kind) for kind in kinds)


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3": gemma3_wrapper,
    "gemma3_text": gemma3,
    "glm4": glm4,
    "hyperclovax": hyperclovax,
    "exaone4": exaone4,
    "olmo2": olmo2,
    "olmo3": olmo2,
}
