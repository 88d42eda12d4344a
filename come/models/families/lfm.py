"""LFM 2 and 3: short convolutions, with attention in some layers, and a dense MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.experts import routed
from come.models.families.mixers import layers_of, mixer
from come.models.families.parts import HEAD_NORMS, Family, attention, ffn, kv_groups
from come.models.families.sparse import after_dense, sparse_layers
from come.models.layout import Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def short_convolution(config: PretrainedConfig, **others: Any) -> Sublayer:
    """A gated short convolution; every channel is a unit."""
    return mixer(
        "conv",
        unit="conv_channel",
        count=config.hidden_size,
        columns=1,
        inputs=(Rows("in_proj", (1, 1, 1)), Rows("conv", reads=False)),
        **others,
    )


def lfm2_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of LFM 2: a short convolution, or attention."""
    norm = Norm("operator_norm")
    norms = ("self_attn.q_layernorm", "self_attn.k_layernorm")
    full = attention(config, output="out_proj", norm=norm, shared=norms)
    mixers = {"conv": short_convolution(config, norm=norm), "full_attention": full}
    return [mixers[kind] for kind in config.layer_types]


def lfm_ffn(channels: int, **others: Any) -> Sublayer:
    """The MLP of LFM 2 and 3."""
    return ffn(
        channels,
        inputs=("feed_forward.w1", "feed_forward.w3"),
        output="feed_forward.w2",
        norm=Norm("ffn_norm"),
        silenced=(("feed_forward", 0),),
        **others,
    )


def lfm2(config: PretrainedConfig) -> ModelLayout:
    """LFM 2, the number of whose channels may be two thirds of the configuration's, rounded up."""
    channels = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        channels = int(2 * channels / 3)
        if config.block_ffn_dim_multiplier is not None:
            channels = int(config.block_ffn_dim_multiplier * channels)
            channels = -(-channels // config.block_multiple_of) * config.block_multiple_of
    mlp = lfm_ffn(channels)
    layers = [(own, mlp) for own in lfm2_mixers(config)]
    return layers_of(layers, config.layer_types, final_norm="model.embedding_norm")


def lfm3(config: PretrainedConfig) -> ModelLayout:
    """LFM 3: short convolution or attention with a gate for each head, and norms of the outputs."""
    norm, after, after_ffn = Norm("operator_norm"), None, None
    if config.use_sandwich_norm:
        after, after_ffn = Norm("post_operator_norm"), Norm("post_ffn_norm")
    full = attention(config, norm=norm, post_norm=after, shared=HEAD_NORMS)
    if config.use_attention_gate:
        groups, _, _ = kv_groups(config)
        gate = Rows("self_attn.g_proj", (config.num_attention_heads // groups,))
        full = replace(full, inputs=(*full.inputs, gate))
    conv = short_convolution(config, norm=norm, post_norm=after)
    mlp = lfm_ffn(config.intermediate_size, post_norm=after_ffn)
    layers = [(conv if kind == "conv" else full, mlp) for kind in config.layer_types]
    return layers_of(layers, config.layer_types, final_norm="model.embedding_norm")


def lfm2_moe(config: PretrainedConfig) -> ModelLayout:
    """LFM 2 with experts, whose router may have a correction bias."""
    bias = [Rows("expert_bias", reads=False)] if config.use_expert_bias else []
    experts = routed(
        config.num_experts,
        config.moe_intermediate_size,
        block="feed_forward",
        router=(Rows("gate"), *bias),
        norm=Norm("ffn_norm"),
    )
    return sparse_layers(
        config,
        after_dense(config, "num_dense_layers"),
        lfm2_mixers(config),
        (experts,),
        lfm_ffn(config.intermediate_size),
        final_norm="model.embedding_norm",
    )


FAMILIES: dict[str, Family] = {"lfm2": lfm2, "lfm2_moe": lfm2_moe, "lfm3": lfm3}
