"""Mixtures of experts with norms after sublayers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families.changes import opaque, with_rows
from come.models.families.experts import CORRECTED, routed, shared, summed
from come.models.families.parts import FFN_NORM, HEAD_NORMS, Family, attention, ffn
from come.models.families.sparse import after_dense, all_sparse, sparse_layers
from come.models.layout import Norm, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def flex_olmo(config: PretrainedConfig) -> ModelLayout:
    """As `coupled_heads`, with norms after the sublayers instead of before."""
    own = attention(config, norm=None, post_norm=Norm("post_attention_layernorm"))
    experts = routed(
        config.num_experts,
        config.intermediate_size,
        norm=None,
        post_norm=Norm("post_feedforward_layernorm"),
    )
    own = opaque(own, "self_attn")
    return sparse_layers(config, all_sparse(config), own, (experts,))


def afmoe(config: PretrainedConfig) -> ModelLayout:
    """Norms before and after each sublayer, gates on the channels of the heads."""
    before, after = Norm("pre_mlp_layernorm"), Norm("post_mlp_layernorm")
    own = attention(config, shared=HEAD_NORMS, post_norm=Norm("post_attention_layernorm"))
    own = with_rows(own, Rows("self_attn.gate_proj", (own.columns,)))
    channels = config.moe_intermediate_size
    router = (Rows("router.gate"), Rows("expert_bias", reads=False))
    experts = (
        routed(config.num_experts, channels, router=router),
        shared(channels * config.num_shared_experts, "mlp.shared_experts"),
    )
    return sparse_layers(
        config,
        after_dense(config, "num_dense_layers"),
        own,
        (summed(experts, "mlp", before, after),),
        ffn(config.intermediate_size, norm=before, post_norm=after),
    )


def kolibri1(config: PretrainedConfig) -> ModelLayout:
    """Norms before and after each sublayer, experts in every layer."""
    after = Norm("post_self_attn_layernorm")
    own = attention(config, shared=HEAD_NORMS, post_norm=after)
    experts = (
        routed(config.num_experts, config.moe_intermediate_size, router=CORRECTED),
        shared(config.shared_expert_intermediate_size, "mlp.shared_experts"),
    )
    both = summed(experts, "mlp", FFN_NORM, Norm("post_mlp_layernorm"))
    return sparse_layers(config, all_sparse(config), own, (both,))


FAMILIES: dict[str, Family] = {
    "afmoe": afmoe,
    "flex_olmo": flex_olmo,
    "kolibri1": kolibri1,
}
