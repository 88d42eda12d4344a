"""Decoders whose queries, keys and values, or gate and up rows, are in one module."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from come.models.families.changes import opaque
from come.models.families.parts import (
    FFN_NORM,
    INPUT_NORM,
    Family,
    attention,
    ffn,
    ffn_channels,
    fused_attention,
    fused_ffn,
    layer_kind,
    same_layers,
)
from come.models.families.ungated import TRANSFORMER
from come.models.layout import LayerLayout, ModelLayout, Norm, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DENSE_4H = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def phi3(config: PretrainedConfig) -> ModelLayout:
    """Phi 3 and 4: all queries, then keys, then values; all gate rows, then up rows."""
    mixer = fused_attention(config, "self_attn", "qkv_proj", stacked=True)
    return same_layers(config, mixer, fused_ffn(config.intermediate_size))


def moshi(config: PretrainedConfig) -> ModelLayout:
    """Moshi: gate rows, then up rows; its projections contain a linear map each."""
    names = ("q_proj.linear", "k_proj.linear", "v_proj.linear")
    return same_layers(
        config,
        attention(config, projections=names, output="o_proj.linear"),
        fused_ffn(config.ffn_dim // 2, "mlp.fc1", output="mlp.fc2"),
    )


def modernbert(config: PretrainedConfig) -> ModelLayout:
    """ModernBERT as a decoder: its first layer has no norm before attention."""

    def layer(index: int) -> LayerLayout:
        norm = Norm("attn_norm") if index else None
        mixer = attention(config, module="attn", output="Wo", norm=norm)
        mlp = fused_ffn(config.intermediate_size, "mlp.Wi", output="mlp.Wo", norm=Norm("mlp_norm"))
        return LayerLayout((mixer, mlp), layer_kind(config, index))

    layers = tuple(layer(index) for index in range(config.num_hidden_layers))
    return ModelLayout(layers, final_norm="model.final_norm", before_head="lm_head")


def gpt(config: PretrainedConfig, *, axis: int, stacked: bool) -> ModelLayout:
    """GPT-2 and its successors by name.

    Args:
        config: the model's configuration.
        axis: 1 if weights are stored as [in, out].
        stacked: whether all queries come first, then all keys, then all values.

    Raises:
        ValueError: the scale of attention depends on the index of the layer.
    """
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "the attention of this model depends on the layer's own index, which a merge changes "
            "(scale_attn_by_inverse_layer_idx=true)"
        )
    return same_layers(
        config,
        fused_attention(
            config, "attn", "c_attn", stacked=stacked, axis=axis, output="c_proj", norm=Norm("ln_1")
        ),
        plain_mlp(config, ("mlp.c_fc", "mlp.c_proj"), Norm("ln_2"), axis=axis),
        **TRANSFORMER,
    )


def gpt_bigcode(config: PretrainedConfig) -> ModelLayout:
    """StarCoder 1: one KV head for all queries, or one for each."""
    return gpt(config, axis=0, stacked=config.multi_query)


def gpt_neox(config: PretrainedConfig) -> ModelLayout:
    """GPT-NeoX and Pythia, with the MLP beside attention or after it."""
    mixer = fused_attention(config, "attention", "query_key_value", stacked=False, output="dense")
    stage = 0 if config.use_parallel_residual else 1
    mlp = plain_mlp(config, DENSE_4H, FFN_NORM, stage=stage)
    return same_layers(
        config, mixer, mlp, stack="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm"
    )


def persimmon(config: PretrainedConfig) -> ModelLayout:
    """Persimmon, with or without norms over each head."""
    norms = ("self_attn.q_layernorm", "self_attn.k_layernorm") if config.qk_layernorm else ()
    mixer = fused_attention(
        config, "self_attn", "query_key_value", stacked=False, output="dense", shared=norms
    )
    mlp = plain_mlp(config, DENSE_4H, FFN_NORM)
    return same_layers(config, mixer, mlp, final_norm="model.final_layernorm")


def codegen(config: PretrainedConfig) -> ModelLayout:
    """CodeGen: four parts, each with the queries, values and keys of a quarter of the heads."""
    mixer = fused_attention(
        config,
        *("attn", "qkv_proj"),
        stacked=True,
        parts=4,
        output="out_proj",
        norm=Norm("ln_1"),
    )
    mlp = plain_mlp(config, ("mlp.fc_in", "mlp.fc_out"), Norm("ln_1"), stage=0)
    return same_layers(config, mixer, mlp, returns=2, **TRANSFORMER)


def falcon(config: PretrainedConfig) -> ModelLayout:
    """Falcon in its forms: KV groups, one KV head, or one for each head; one norm or two."""
    norms = _falcon_norms(config)
    groups = 1 if config.multi_query else config.num_attention_heads
    mixer = fused_attention(
        config,
        *("self_attention", "query_key_value"),
        stacked=False,
        groups=config.num_kv_heads if config.new_decoder_architecture else groups,
        output="dense",
        norm=Norm(norms[0]),
    )
    stage = 0 if config.parallel_attn or config.new_decoder_architecture else 1
    mlp = plain_mlp(config, DENSE_4H, Norm(norms[1]), stage=stage)
    if config.alibi:
        if norms[0] == norms[1]:
            raise ValueError("this Falcon has ALiBi and one norm for attention and MLP together")
        mixer = opaque(mixer, "self_attention")
    return same_layers(config, mixer, mlp, returns=2, **TRANSFORMER)


def plain_mlp(
    config: PretrainedConfig, maps: tuple[str, str], norm: Norm, **others: Any
) -> Sublayer:
    """An MLP with these input and output projections and without a gate."""
    return ffn(ffn_channels(config), inputs=maps[:1], output=maps[1], norm=norm, **others)


def _falcon_norms(config: PretrainedConfig) -> tuple[str, str]:
    """The norms before attention and before the MLP of a Falcon."""
    if not config.parallel_attn:
        return INPUT_NORM.module, FFN_NORM.module
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return "ln_attn", "ln_mlp"
    return INPUT_NORM.module, INPUT_NORM.module


FAMILIES: dict[str, Family] = {
    "codegen": codegen,
    "falcon": falcon,
    "gpt2": partial(gpt, axis=1, stacked=True),
    "gpt_bigcode": gpt_bigcode,
    "gpt_neox": gpt_neox,
    "modernbert-decoder": modernbert,
    "moshi": moshi,
    "persimmon": persimmon,
    **dict.fromkeys(("phi3", "phi4_multimodal"), phi3),
}
