"""Mixtures of experts with blocks or tensors of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from come.models.families.experts import routed, shared
from come.models.families.parts import Family, attention, ffn
from come.models.families.sparse import all_sparse, sparse_layers
from come.models.layout import Norm, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def ernie(config: PretrainedConfig) -> ModelLayout:
    """A correction bias in a module of its own, and experts from one layer to another.

    Raises:
        ValueError: only every n-th layer has experts.
    """
    if config.moe_layer_interval != 1:
        raise ValueError(
            f"this model has experts in every {config.moe_layer_interval}th layer "
            "(moe_layer_interval), which merging layers would not keep; supported is 1"
        )
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    channels, number = config.moe_intermediate_size, config.moe_num_shared_experts
    bias = Rows("gate.moe_statics.e_score_correction_bias", axis=1, reads=False)
    experts = [routed(config.num_experts, channels, router=(Rows("gate"), bias))]
    if number > 0:
        experts.append(shared(channels * number, "mlp.shared_experts"))
    return sparse_layers(
        config,
        [first <= index <= last for index in range(config.num_hidden_layers)],
        attention(config),
        tuple(experts),
        ffn(config.intermediate_size),
    )


def hunyuan(config: PretrainedConfig) -> ModelLayout:
    """Norms over each head after the rotary embeddings, and a shared expert.

    Raises:
        ValueError: layers differ in their number of experts.
    """
    lists = [k for k in ("num_experts", "moe_topk") if not isinstance(getattr(config, k), int)]
    if lists:
        raise ValueError(
            f"this model has one {lists[0]} for each layer, which merging layers would not keep; "
            "supported is one number for all layers"
        )
    norms = ("self_attn.query_layernorm", "self_attn.key_layernorm")
    experts = (
        routed(config.num_experts, config.intermediate_size, router=(Rows("gate.wg"),)),
        shared(config.intermediate_size, "mlp.shared_mlp"),
    )
    own = attention(config, shared=norms)
    return sparse_layers(config, all_sparse(config), own, experts)


def llama4(config: PretrainedConfig) -> ModelLayout:
    """The routing weights multiply what the experts read."""
    config, block = config.get_text_config(decoder=True), "feed_forward"
    experts = (
        routed(
            config.num_local_experts,
            config.intermediate_size,
            block=block,
            router=(Rows("router"),),
            transposed=True,
            output_transposed=True,
            activation="act_fn",
            halves=True,
            weighted=True,
        ),
        shared(config.intermediate_size, f"{block}.shared_expert"),
    )
    dense = ffn(
        config.intermediate_size_mlp,
        inputs=(f"{block}.gate_proj", f"{block}.up_proj"),
        output=f"{block}.down_proj",
        silenced=((block, 0),),
    )
    sparse = [index in config.moe_layers for index in range(config.num_hidden_layers)]
    return sparse_layers(config, sparse, attention(config), experts, dense)


def aria(config: PretrainedConfig) -> ModelLayout:
    """Experts stored as [experts, inputs, outputs], and a shared expert."""
    channels = config.intermediate_size
    experts = (
        routed(
            config.moe_num_experts,
            channels,
            router=(Rows("router"),),
            transposed=True,
            output_transposed=True,
        ),
        shared(channels * config.moe_num_shared_experts, "mlp.shared_experts"),
    )
    return sparse_layers(config, all_sparse(config), attention(config), experts)


def dbrx(config: PretrainedConfig) -> ModelLayout:
    """Both norms in a module with attention; experts below each other in each tensor."""
    module, ffns = "norm_attn_norm", config.ffn_config
    groups = config.attn_config.kv_n_heads
    head_dim = config.d_model // config.n_heads
    queries = config.n_heads // groups * head_dim
    own = replace(
        attention(config, module=f"{module}.attn", output="out_proj"),
        norm=Norm(f"{module}.norm_1"),
        count=groups,
        inputs=(Rows(f"{module}.attn.Wqkv", (queries, head_dim, head_dim)),),
        columns=queries,
    )
    experts = routed(
        ffns.moe_num_experts,
        ffns.ffn_hidden_size,
        block="ffn",
        router=(Rows("router.layer"),),
        norm=Norm(f"{module}.norm_2"),
        inputs=("mlp.w1", "mlp.v1"),
        output="mlp.w2",
        output_transposed=True,
        stacked=True,
        activation="mlp.activation_fn",
        halves=True,
    )
    return sparse_layers(
        config,
        all_sparse(config),
        own,
        (experts,),
        stack="transformer.blocks",
        final_norm="transformer.norm_f",
    )


FAMILIES: dict[str, Family] = {
    "ernie4_5_moe": ernie,
    "hunyuan_v1_moe": hunyuan,
    "llama4": llama4,
    "llama4_text": llama4,
    "aria_text": aria,
    "dbrx": dbrx,
}
