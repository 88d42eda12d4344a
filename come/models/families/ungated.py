"""Decoders with separate projections whose MLP has a single input projection."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from come.models.families.parts import (
    FFN_NORM,
    INPUT_NORM,
    Family,
    attention,
    ffn,
    ffn_channels,
    same_layers,
)
from come.models.layout import Norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

TRANSFORMER: dict[str, Any] = {"stack": "transformer.h", "final_norm": "transformer.ln_f"}


def ungated(
    config: PretrainedConfig,
    *,
    norms: tuple[str, str] = (INPUT_NORM.module, FFN_NORM.module),
    offset: float = 0.0,
    module: str = "self_attn",
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    output: str = "o_proj",
    maps: tuple[str, str] = ("mlp.up_proj", "mlp.down_proj"),
    head_norms: tuple[str, ...] = (),
    activation: tuple[str, ...] = (),
    **model: Any,
) -> ModelLayout:
    """Attention and an MLP without a gate; side by side if both read the same norm.

    Args:
        config: the model's configuration.
        norms: the norms before attention and before the MLP.
        offset: what is added to the weights of norms.
        module: the attention module.
        projections: its projections of queries, keys and values.
        output: its output projection.
        maps: input and output projection of the MLP.
        head_norms: norms over each head after the query and key projections.
        activation: the activation of the MLP if it has parameters.
        model: further attributes of the model's layout.
    """
    before, after = (Norm(name, offset) for name in norms)
    mlp = maps[0].rpartition(".")[0]
    return same_layers(
        config,
        attention(
            config,
            module=module,
            projections=projections,
            output=output,
            norm=before,
            shared=head_norms,
        ),
        ffn(
            ffn_channels(config),
            inputs=maps[:1],
            output=maps[1],
            norm=after,
            silenced=((mlp, 0),) if mlp else tuple((name, 0) for name in maps),
            stage=int(before != after),
            shared=activation,
        ),
        **model,
    )


def phi(config: PretrainedConfig) -> ModelLayout:
    """Phi 1 and 2, with or without norms over each head."""
    norms = ("self_attn.q_layernorm", "self_attn.k_layernorm") if config.qk_layernorm else ()
    return ungated(
        config,
        norms=(INPUT_NORM.module, INPUT_NORM.module),
        output="dense",
        maps=("mlp.fc1", "mlp.fc2"),
        head_norms=norms,
        final_norm="model.final_layernorm",
    )


_like_opt = partial(
    ungated,
    norms=("self_attn_layer_norm", "final_layer_norm"),
    output="out_proj",
    maps=("fc1", "fc2"),
)


def opt(config: PretrainedConfig) -> ModelLayout:
    """The pre-norm sizes of OPT.

    Raises:
        ValueError: the model is a post-norm OPT, or an OPT with projected embeddings.
    """
    if not config.do_layer_norm_before:
        raise ValueError(
            "this OPT normalises after each block (do_layer_norm_before=false, as opt-350m); "
            "supported are the pre-norm sizes: 125m, 1.3b and larger"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise ValueError(
            f"this OPT projects its embeddings from {config.word_embed_proj_dim} to "
            f"{config.hidden_size} channels, which is not supported; "
            "supported are 125m, 1.3b and larger"
        )
    final_norm = "model.decoder.final_layer_norm"
    return _like_opt(config, stack="model.decoder.layers", final_norm=final_norm)


FAMILIES: dict[str, Family] = {
    "apertus": partial(
        ungated,
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        activation=("mlp.act_fn",),
    ),
    "arcee": ungated,
    "biogpt": partial(_like_opt, stack="biogpt.layers", final_norm="biogpt.layer_norm"),
    "ctrl": partial(
        ungated,
        norms=("layernorm1", "layernorm2"),
        module="multi_head_attention",
        projections=("Wq", "Wk", "Wv"),
        output="dense",
        maps=("ffn.0", "ffn.2"),
        stack="transformer.h",
        final_norm="transformer.layernorm",
    ),
    "gpt_neo": partial(
        ungated,
        norms=("ln_1", "ln_2"),
        module="attn.attention",
        output="out_proj",
        maps=("mlp.c_fc", "mlp.c_proj"),
        returns=2,
        **TRANSFORMER,
    ),
    "gptj": partial(
        ungated,
        norms=("ln_1", "ln_1"),
        module="attn",
        output="out_proj",
        maps=("mlp.fc_in", "mlp.fc_out"),
        returns=2,
        **TRANSFORMER,
    ),
    "jais2": ungated,
    "nanochat": partial(ungated, maps=("mlp.fc1", "mlp.fc2")),  # its norms have no parameters
    "nemotron": partial(ungated, offset=1.0),
    "opt": opt,
    "phi": phi,
    "starcoder2": partial(ungated, maps=("mlp.c_fc", "mlp.c_proj")),
    "xglm": partial(_like_opt, final_norm="model.layer_norm"),
}
