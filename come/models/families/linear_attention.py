"""Linear attention by the delta rule, with attention in some layers, and a dense MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.mixers import (
    delta_net,
    delta_sizes,
    latent_attention,
    layers_of,
    mixer,
    whole_mixer,
)
from come.models.families.parts import HEAD_NORMS, Family, attention, ffn, kv_groups
from come.models.layout import Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

QWEN_NORM, QWEN_FFN_NORM = Norm("input_layernorm", 1.0), Norm("post_attention_layernorm", 1.0)
POST_NORM, POST_FFN_NORM = Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm")


def gated_attention(config: PretrainedConfig, **others: Any) -> Sublayer:
    """Attention whose query projection holds the query and the output gate of every head."""
    base = attention(config, shared=HEAD_NORMS, **others)
    query, *rest = base.inputs
    return replace(base, inputs=(Rows(query.name, (2 * base.columns,)), *rest))


def qwen3_5_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of Qwen 3.5: a gated DeltaNet, or gated attention."""
    _, heads, keys, values = delta_sizes(config)
    linear = delta_net(
        config,
        Rows("in_proj_qkv", (keys, keys, values)),
        Rows("in_proj_z", (values,)),
        Rows("in_proj_b", (heads,)),
        Rows("in_proj_a", (heads,)),
        norm=QWEN_NORM,
        shared=("linear_attn.norm",),
    )
    return _by_kind(config, linear, gated_attention(config, norm=QWEN_NORM))


def qwen3_next_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of Qwen3-Next; all rows of a key head are adjacent."""
    _, heads, keys, values = delta_sizes(config)
    linear = delta_net(
        config,
        Rows("in_proj_qkvz", (2 * keys + 2 * values,)),
        Rows("in_proj_ba", (2 * heads,)),
        norm=QWEN_NORM,
        shared=("linear_attn.norm",),
    )
    return _by_kind(config, linear, gated_attention(config, norm=QWEN_NORM))


def kimi_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of Kimi Linear.

    The heads of its delta attention read common low-rank gates, and those of its latent attention
    common latent states, so both are kept whole.
    """
    width = config.linear_num_heads * config.linear_head_dim
    linear = whole_mixer("self_attn", width, output="o_proj")
    return _by_kind(config, linear, latent_attention(config))


def bailing_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of Bailing Hybrid: delta attention of independent heads, or latent.

    Unlike Kimi Linear's, its gates are of full rank.
    """
    width = config.linear_head_dim
    rows = ("q_proj", "k_proj", "v_proj", "g_proj", "forget_gate.f_proj")
    linear = mixer(
        "self_attn",
        unit="key_head",
        count=config.linear_num_heads,
        columns=width,
        inputs=(
            *(Rows(name, (width,)) for name in rows),
            Rows("b_proj"),
            Rows("conv1d", (width,) * 3, reads=False),
            Rows("forget_gate.A_log", reads=False),
            Rows("forget_gate.dt_bias", (width,), reads=False),
        ),
        output="o_proj",
        shared=("self_attn.o_norm",),
    )
    return _by_kind(config, linear, latent_attention(config))


def _by_kind(config: PretrainedConfig, linear: Sublayer, full: Sublayer) -> list[Sublayer]:
    """The mixer of every layer."""
    mixers = {"linear_attention": linear, "full_attention": full}
    return [mixers[kind] for kind in config.layer_types]


def qwen3_5(config: PretrainedConfig) -> ModelLayout:
    """Qwen 3.5, also as the text model of a model with images."""
    text = config.get_text_config(decoder=True)
    mlp = ffn(text.intermediate_size, norm=QWEN_FFN_NORM)
    return layers_of([(own, mlp) for own in qwen3_5_mixers(text)], text.layer_types)


def olmo_hybrid(config: PretrainedConfig) -> ModelLayout:
    """OLMo Hybrid: pre-norm layers with a gated DeltaNet, and post-norm layers with attention.

    The norms of its queries and keys are over all heads, so attention is kept whole.
    """
    _, heads, keys, values = delta_sizes(config)
    sizes = {"q": keys, "k": keys, "v": values, "g": values, "a": heads, "b": heads}
    linear = delta_net(
        config,
        *(Rows(f"{name}_proj", (size,)) for name, size in sizes.items()),
        output="o_proj",
        shared=("linear_attn.o_norm",),
    )
    groups, queries, _ = kv_groups(config)
    full = whole_mixer(
        "self_attn", groups * queries, output="o_proj", norm=None, post_norm=POST_NORM, returns=2
    )
    layers = {
        "linear_attention": (linear, ffn(config.intermediate_size)),
        "full_attention": (
            full,
            ffn(config.intermediate_size, norm=None, post_norm=POST_FFN_NORM),
        ),
    }
    return layers_of([layers[kind] for kind in config.layer_types], config.layer_types)


FAMILIES: dict[str, Family] = {
    "qwen3_5": qwen3_5,
    "qwen3_5_text": qwen3_5,
    "olmo_hybrid": olmo_hybrid,
}
