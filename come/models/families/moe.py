"""Mixtures of experts: attention, then routed experts, with or without a shared expert."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from come.models.families.changes import opaque, per_head, with_rows
from come.models.families.experts import (
    CORRECTED,
    CORRECTED_BLOCK,
    beside_experts,
    corrected_experts,
    routed,
    shared,
)
from come.models.families.parts import HEAD_NORMS, Family, attention, ffn, fused_ffn
from come.models.families.sparse import (
    SparseRule,
    after_dense,
    all_sparse,
    in_steps,
    listed,
    sparse_layers,
)
from come.models.layout import Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout, Sublayer


def mixtral(config: PretrainedConfig, router: str = "gate") -> ModelLayout:
    """Experts in every layer, of the size `intermediate_size`."""
    experts = routed(config.num_local_experts, config.intermediate_size, router=(Rows(router),))
    return sparse_layers(config, all_sparse(config), attention(config), (experts,))


def coupled_heads(config: PretrainedConfig, corrected: bool = False) -> ModelLayout:
    """As `mixtral`, with norms over all query heads and over all key heads."""
    router = CORRECTED_BLOCK if corrected else (Rows("gate"),)
    experts = routed(config.num_local_experts, config.intermediate_size, router=router)
    own = opaque(attention(config), "self_attn")
    return sparse_layers(config, all_sparse(config), own, (experts,))


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
    own = attention(config, shared=HEAD_NORMS)
    own = with_rows(own, *per_head(config, "self_attn.sinks"))
    experts = (
        routed(config.num_experts, config.moe_intermediate_size),
        shared(config.shared_expert_intermediate_size, "mlp.shared_expert"),
    )
    return sparse_layers(config, in_steps(config), own, experts, ffn(config.intermediate_size))


def granite(config: PretrainedConfig) -> ModelLayout:
    """Sublayers times a constant; a shared expert outside the block, with fused projections."""
    own = attention(config, factor=config.residual_multiplier)
    if config.model_type == "granitemoe_swa":
        own = with_rows(own, *per_head(config, "self_attn.sinks"))
    scale = 1 / config.logits_scaling
    experts = granite_experts(config)
    return sparse_layers(config, all_sparse(config), own, experts, logit_scale=scale)


def granite_experts(config: PretrainedConfig) -> tuple[Sublayer, ...]:
    """The experts of Granite, with or without a shared one; only that one if there are none."""
    count, factor = config.num_local_experts, config.residual_multiplier
    mlp = fused_ffn(
        getattr(config, "shared_intermediate_size", 0),
        "shared_mlp.input_linear",
        output="shared_mlp.output_linear",
        silenced=(("shared_mlp", 0),),
        factor=factor,
    )
    if not count:
        return (mlp,)
    experts = routed(
        count,
        config.intermediate_size,
        block="block_sparse_moe",
        router=(Rows("router"),),
        factor=factor,
    )
    return (experts, beside_experts(mlp)) if mlp.count else (experts,)


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
    own = with_rows(attention(config), *per_head(config, "self_attn.sinks"))
    return sparse_layers(config, all_sparse(config), own, (experts,))


def corrected(
    config: PretrainedConfig,
    sparse: SparseRule = listed,
    head_norms: bool = True,
    router: tuple[Rows, ...] = CORRECTED,
) -> ModelLayout:
    """Routers with a correction bias, with or without groups, and a shared expert.

    Args:
        config: the model's configuration.
        sparse: which layers have experts.
        head_norms: whether there are norms over each head.
        router: the rows of the router.
    """
    own = attention(config, shared=HEAD_NORMS if head_norms else ())
    layers = sparse(config)
    dense = None if all(layers) else ffn(config.intermediate_size)
    return sparse_layers(config, layers, own, corrected_experts(config, router), dense)


def glm4_moe(config: PretrainedConfig) -> ModelLayout:
    """As `corrected`, with norms over each head in the larger models only."""
    return corrected(config, after_dense, config.use_qk_norm)


FAMILIES: dict[str, Family] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": coupled_heads,
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa"), granite),
    "phimoe": partial(mixtral, router="router"),
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "dots1": partial(corrected, sparse=after_dense),
    "minimax_m2": partial(coupled_heads, corrected=True),
    "mellum": qwen3_moe,
    "exaone_moe": corrected,
    "hy_v3": partial(corrected, router=CORRECTED_BLOCK),
    "solar_open": partial(corrected, sparse=all_sparse, head_norms=False),
    "flint": flint,
}
