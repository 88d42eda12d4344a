"""Module names of the supported decoder families; the only family-specific code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """Dotted module names of one pre-norm decoder family.

    `layers` and `final_norm` are relative to the causal LM; the other module names are relative to
    one decoder layer. `head_norms` are norms over head_dim after the query and key projections
    (Qwen3). `ffn_size_key` is the configuration key of the number of MLP channels.
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention_norm: str = "input_layernorm"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    head_norms: tuple[str, ...] = ()
    ffn_norm: str = "post_attention_layernorm"
    ffn_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_output: str = "mlp.down_proj"
    ffn_size_key: str = "intermediate_size"

    @property
    def decoder(self) -> str:
        """The module that embeds tokens and loops over the layers."""
        return self.layers.rpartition(".")[0]

    @property
    def attention(self) -> str:
        """The attention module of a layer; it returns its residual update and attention weights."""
        return self.queries.rpartition(".")[0]

    def check(self, config: PretrainedConfig) -> None:
        """Rejects variants of the family whose layers are not plain pre-norm blocks.

        Raises:
            ValueError: the model is a post-norm OPT, or an OPT with projected embeddings.
        """
        if self.model_type != "opt":
            return
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


_GATED = Architecture("llama")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _GATED,
    "mistral": replace(_GATED, model_type="mistral"),
    "qwen2": replace(_GATED, model_type="qwen2"),
    "qwen3": replace(
        _GATED, model_type="qwen3", head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    "opt": Architecture(
        "opt",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        attention_output="self_attn.out_proj",
        ffn_norm="final_layer_norm",
        ffn_inputs=("fc1",),
        ffn_output="fc2",
        ffn_size_key="ffn_dim",
    ),
}


def check_model_type(model_type: str | None) -> None:
    """Raises ValueError, naming the supported families, for an unsupported model type."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model type {model_type!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)} (a family is one entry in come/models/architectures.py)"
        )


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture that a model's configuration belongs to.

    Raises:
        ValueError: the family, or this variant of it, is not supported.
    """
    check_model_type(config.model_type)
    architecture = ARCHITECTURES[config.model_type]
    architecture.check(config)
    return architecture
