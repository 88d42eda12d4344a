"""Mixtures of experts: attention, then routed experts, with or without a shared expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from come.models.families.experts import opaque_attention, routed, shared, sinks, with_rows
from come.models.families.parts import Family, attention, ffn
from come.models.families.sparse import after_dense, all_sparse, in_steps, listed, sparse_layers
from come.models.layout import Gate, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout, Sublayer

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
CORRECTED = (Rows("gate"), Rows("gate.e_score_correction_bias", reads=False))
CORRECTED_BLOCK = (Rows("gate"), Rows("e_score_correction_bias", reads=False))


def mixtral(config: PretrainedConfig, router: str = "gate") -> ModelLayout:
    """Experts in every layer, of the size `intermediate_size`."""
    experts = routed(config.num_local_experts, config.intermediate_size, router=(Rows(router),))
    return sparse_layers(config, all_sparse(config), attention(config), (experts,))


def coupled_heads(config: PretrainedConfig, corrected: bool = False) -> ModelLayout:
    """As `mixtral`, with norms over all query heads and over all key heads."""
    router = CORRECTED_BLOCK if corrected else (Rows("gate"),)
    experts = routed(config.num_local_experts, config.intermediate_size, router=router)
    return sparse_layers(config, all_sparse(config), opaque_attention(config), (experts,))


def qwen3_moe(config: PretrainedConfig) -> ModelLayout:
    """Norms over each head, and MLPs without experts in some layers."""
    by_list = getattr(config, "mlp_layer_types", None)
    return sparse_layers(
        config,
        listed(config) if by_list else in_steps(config),
        attention(config, shared=HEAD_NORMS),
        (routed(config.num_experts, config.moe_intermediate_size),),
        ffn(config.intermediate_size),
    )


def qwen2_moe(config: PretrainedConfig) -> ModelLayout:
    """A shared expert whose output is multiplied by a gate."""
    experts = (
        routed(config.num_experts, config.moe_intermediate_size),
        shared(
            config.shared_expert_intermediate_size,
            "mlp.shared_expert",
            output_gate="mlp.shared_expert_gate",
        ),
    )
    dense = ffn(config.intermediate_size)
    return sparse_layers(config, in_steps(config), attention(config), experts, dense)


def flint(config: PretrainedConfig) -> ModelLayout:
    """Attention sinks, norms over each head, and a shared expert."""
    own = with_rows(attention(config, shared=HEAD_NORMS), sinks(config))
    experts = (
        routed(config.num_experts, config.moe_intermediate_size),
        shared(config.shared_expert_intermediate_size, "mlp.shared_expert"),
    )
    return sparse_layers(config, in_steps(config), own, experts, ffn(config.intermediate_size))


def granite(config: PretrainedConfig) -> ModelLayout:
    """Sublayers times a constant; a shared expert outside the block, with fused projections."""
    factor, block = config.residual_multiplier, "block_sparse_moe"
    own = attention(config, factor=factor)
    if config.model_type == "granitemoe_swa":
        own = with_rows(own, sinks(config))
    experts: tuple[Sublayer, ...] = (
        routed(
            config.num_local_experts,
            config.intermediate_size,
            block=block,
            router=(Rows("router"),),
            factor=factor,
        ),
    )
    channels = getattr(config, "shared_intermediate_size", 0)
    if channels:
        fused = "shared_mlp.input_linear"
        own_shared = replace(
            shared(channels, "shared_mlp", factor=factor),
            inputs=(Rows(fused, (1, 1)),),
            gates=(Gate(fused), Gate(fused, start=channels)),
            output="shared_mlp.output_linear",
        )
        experts = (*experts, own_shared)
    scale = 1 / config.logits_scaling
    return sparse_layers(config, all_sparse(config), own, experts, logit_scale=scale)


def gpt_oss(config: PretrainedConfig) -> ModelLayout:
    """Attention sinks, and experts with biases; gate and up rows are interleaved."""
    experts = routed(
        config.num_local_experts,
        config.intermediate_size,
        router=(Rows("router"),),
        input_biases=("gate_up_proj_bias",),
        output_bias="down_proj_bias",
        transposed=True,
        output_transposed=True,
    )
    own = with_rows(attention(config), sinks(config))
    return sparse_layers(config, all_sparse(config), own, (experts,))


def corrected(config: PretrainedConfig, head_norms: bool = True) -> ModelLayout:
    """Routers with a correction bias and with groups, and a shared expert."""
    if config.model_type in ("glm4_moe", "dots1"):
        sparse = after_dense(config)
    else:
        sparse = listed(config) if hasattr(config, "mlp_layer_types") else all_sparse(config)
    number = getattr(config, "n_shared_experts", None) or config.num_shared_experts
    channels = config.moe_intermediate_size
    experts = (
        routed(experts_of(config), channels, router=CORRECTED, groups=config.n_group),
        shared(channels * number, "mlp.shared_experts"),
    )
    own = attention(config, shared=HEAD_NORMS if head_norms else ())
    dense = None if all(sparse) else ffn(config.intermediate_size)
    return sparse_layers(config, sparse, own, experts, dense)


def glm4_moe(config: PretrainedConfig) -> ModelLayout:
    """As `corrected`, with norms over each head in the larger models only."""
    return corrected(config, config.use_qk_norm)


def hy_v3(config: PretrainedConfig) -> ModelLayout:
    """As `corrected` without groups, the correction bias beside the router."""
    channels = config.moe_intermediate_size
    experts = (
        routed(experts_of(config), channels, router=CORRECTED_BLOCK),
        shared(channels * config.num_shared_experts, "mlp.shared_experts"),
    )
    own = attention(config, shared=HEAD_NORMS)
    return sparse_layers(config, listed(config), own, experts, ffn(config.intermediate_size))


def experts_of(config: PretrainedConfig) -> int:
    """Number of experts of one layer."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next(count for name in names if (count := getattr(config, name, None)))


FAMILIES: dict[str, Family] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": coupled_heads,
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa"), granite),
    "phimoe": partial(mixtral, router="router"),
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "dots1": corrected,
    "minimax_m2": partial(coupled_heads, corrected=True),
    "mellum": qwen3_moe,
    "exaone_moe": corrected,
    "hy_v3": hy_v3,
    "solar_open": partial(corrected, head_norms=False),
    "flint": flint,
}
