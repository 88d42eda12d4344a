"""Mixtures of experts whose attention differs between layers, or is beside the experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.changes import opaque
from come.models.families.experts import CORRECTED, beside_experts, routed, shared
from come.models.families.parts import (
    FFN_NORM,
    HEAD_NORMS,
    INPUT_NORM,
    Family,
    attention,
    ffn,
    fused_ffn,
)
from come.models.families.sparse import listed, sparse_layers
from come.models.layout import Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def laguna(config: PretrainedConfig) -> ModelLayout:
    """Gates on the heads, whose number differs between layers."""
    groups, head_dim = config.num_key_value_heads, config.head_dim

    def own(index: int) -> Sublayer:
        heads = config.num_attention_heads_per_layer[index] // groups
        per_head = config.gating is True or config.gating == "per-head"
        gate = Rows("self_attn.g_proj", (heads if per_head else heads * head_dim,))
        found = attention(config, shared=HEAD_NORMS)
        queries, *others = found.inputs
        inputs = (replace(queries, sizes=(heads * head_dim,)), *others, gate)
        return replace(found, inputs=inputs, columns=heads * head_dim)

    experts = (
        routed(
            config.num_experts,
            config.moe_intermediate_size,
            router=CORRECTED,
            factor=config.moe_routed_scaling_factor,
        ),
        shared(config.shared_expert_intermediate_size, "mlp.shared_experts"),
    )
    layers = [own(index) for index in range(config.num_hidden_layers)]
    return sparse_layers(config, listed(config), layers, experts, ffn(config.intermediate_size))


def cohere(config: PretrainedConfig) -> ModelLayout:
    """Attention and experts side by side, after one norm."""
    number, channels = config.num_shared_experts, config.intermediate_size
    mean = number > 0 and config.shared_expert_combination_strategy == "average"
    place: dict[str, Any] = {"norm": INPUT_NORM, "factor": 0.5 if mean else 1.0, "stage": 0}
    experts = [routed(config.num_experts, channels, **place)]
    if number > 0:
        experts.append(shared(channels * number, "mlp.shared_experts", **place))
    dense = ffn(config.prefix_dense_intermediate_size, norm=INPUT_NORM, stage=0)
    own, scale = attention(config), config.logit_scale or 1.0
    sparse = listed(config)
    return sparse_layers(config, sparse, own, tuple(experts), dense, logit_scale=scale)


def mimo(config: PretrainedConfig) -> ModelLayout:
    """Layers with a window have sinks and twice the KV heads; values have their own size."""
    heads, size, values = config.num_attention_heads, config.head_dim, config.v_head_dim

    def own(index: int) -> Sublayer:
        window = config.layer_types[index] == "sliding_attention"
        groups = config.num_key_value_heads * (2 if window else 1)
        each = heads // groups
        rows = {"q_proj": each * size, "k_proj": size, "v_proj": values}
        inputs = [Rows(f"self_attn.{name}", (count,)) for name, count in rows.items()]
        if window:
            inputs.append(Rows("self_attn.sinks", (each,), reads=False))
        found = attention(config)
        return replace(found, count=groups, inputs=tuple(inputs), columns=each * values)

    experts = routed(
        config.n_routed_experts,
        config.moe_intermediate_size,
        router=CORRECTED,
        groups=config.n_group,
    )
    dense = ffn(config.intermediate_size)
    layers = [own(index) for index in range(config.num_hidden_layers)]
    return sparse_layers(config, listed(config), layers, (experts,), dense)


def minimax_m3(config: PretrainedConfig) -> ModelLayout:
    """Attention to blocks of tokens in some layers, which is kept whole; scales of 1 + weight."""
    before, after = (Norm(norm.module, 1.0) for norm in (INPUT_NORM, FFN_NORM))
    full = attention(config, norm=before, shared=HEAD_NORMS)
    mixers = {"full_attention": full, "minimax_m3_sparse": opaque(full, "self_attn")}
    experts = (
        routed(
            config.num_local_experts,
            config.intermediate_size,
            router=CORRECTED,
            factor=config.routed_scaling_factor,
            norm=after,
        ),
        beside_experts(
            fused_ffn(
                config.shared_intermediate_size,
                "mlp.shared_experts.gate_up_proj",
                output="mlp.shared_experts.down_proj",
                silenced=(("mlp.shared_experts", 0),),
                norm=after,
            )
        ),
    )
    dense = fused_ffn(config.dense_intermediate_size, norm=after)
    layers = [mixers[kind] for kind in config.layer_types]
    return sparse_layers(config, listed(config), layers, experts, dense)


FAMILIES: dict[str, Family] = {
    "cohere2_moe": cohere,
    "laguna": laguna,
    "mimo_v2_flash": mimo,
    "minimax_m3_vl_text": minimax_m3,
}
