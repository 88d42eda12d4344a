"""Decoders with separate projections and a gated MLP, whose sublayers read normed states."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from come.models.families.changes import per_head, with_rows
from come.models.families.parts import (
    FFN_NORM,
    HEAD_NORMS,
    INPUT_NORM,
    Family,
    attention,
    ffn,
    ffn_channels,
    fused_ffn,
    same_layers,
)
from come.models.layout import Norm, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def gated(
    config: PretrainedConfig,
    *,
    offset: float = 0.0,
    ffn_norm: str = FFN_NORM.module,
    head_norms: tuple[str, ...] = (),
) -> ModelLayout:
    """LLaMA and its relatives, with or without biases.

    Args:
        config: the model's configuration.
        offset: what is added to the weights of norms.
        ffn_norm: the norm before the MLP.
        head_norms: norms over each head after the query and key projections.
    """
    mixer = attention(config, norm=Norm(INPUT_NORM.module, offset), shared=head_norms)
    return same_layers(config, mixer, ffn(ffn_channels(config), norm=Norm(ffn_norm, offset)))


def head_normed(config: PretrainedConfig) -> ModelLayout:
    """Qwen 3: norms over each head after the query and key projections."""
    return gated(config, head_norms=HEAD_NORMS)


def scaled(config: PretrainedConfig, *, sinks: bool = False) -> ModelLayout:
    """Granite: a constant multiplies the output of every sublayer."""
    factor = config.residual_multiplier
    mixer = attention(config, factor=factor)
    if sinks:
        mixer = with_rows(mixer, *per_head(config, "self_attn.sinks"))
    mlp = ffn(config.intermediate_size, factor=factor)
    return same_layers(config, mixer, mlp, logit_scale=1 / config.logits_scaling)


def fused_mlp(config: PretrainedConfig) -> ModelLayout:
    """GLM: one module of gate and up rows."""
    return same_layers(config, attention(config), fused_ffn(config.intermediate_size))


def side_by_side(config: PretrainedConfig) -> ModelLayout:
    """Cohere: attention and MLP read the same normed states; perhaps with a norm for each head."""
    mixer = attention(config)
    if getattr(config, "use_qk_norm", False):
        keys = Rows("self_attn.k_norm", reads=False)
        mixer = with_rows(mixer, *per_head(config, "self_attn.q_norm"), keys)
    mlp = ffn(config.intermediate_size, norm=INPUT_NORM, stage=0)
    return same_layers(config, mixer, mlp, logit_scale=getattr(config, "logit_scale", None) or 1.0)


def stablelm(config: PretrainedConfig) -> ModelLayout:
    """StableLM, with its MLP after attention or beside it.

    Raises:
        ValueError: every head has a norm module of its own.
    """
    if config.qk_layernorm:
        raise ValueError(
            "this StableLM has a norm module for every head (qk_layernorm=true), "
            "which is not supported"
        )
    if config.use_parallel_residual:
        return side_by_side(config)
    return gated(config)


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "ministral", "ministral3", "helium"), gated),
    **dict.fromkeys(("internlm3", "iquestcoder", "ernie4_5", "cwm", "smollm3", "seed_oss"), gated),
    "olmo": gated,  # its norms have no parameters
    "gemma": partial(gated, offset=1.0),
    "vaultgemma": partial(gated, offset=1.0, ffn_norm="pre_feedforward_layernorm"),
    "qwen3": head_normed,
    "hunyuan_v1_dense": partial(
        gated, head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
    "granite": scaled,
    "granite_swa": partial(scaled, sinks=True),
    "glm": fused_mlp,
    **dict.fromkeys(("cohere", "cohere2", "cohere_compass_text"), side_by_side),
    "stablelm": stablelm,
}
