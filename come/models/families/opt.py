"""OPT: LayerNorm with biases, and an MLP without a gate and without a module of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families.parts import Family, attention, ffn, same_layers
from come.models.layout import Norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


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
    return same_layers(
        config,
        attention(config, output="out_proj", norm=Norm("self_attn_layer_norm")),
        ffn(
            config.ffn_dim,
            inputs=("fc1",),
            output="fc2",
            norm=Norm("final_layer_norm"),
            silenced=(("fc1", 0), ("fc2", 0)),
        ),
        stack="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
    )


FAMILIES: dict[str, Family] = {"opt": opt}
