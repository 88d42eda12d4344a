"""Pre-norm decoders with separate projections: attention, then a gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families.parts import Family, attention, ffn, same_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def gated(config: PretrainedConfig) -> ModelLayout:
    """LLaMA and its relatives, with or without biases."""
    return same_layers(config, attention(config), ffn(config.intermediate_size))


def head_norms(config: PretrainedConfig) -> ModelLayout:
    """As `gated`, with norms over each head after the query and key projections."""
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    return same_layers(config, attention(config, shared=norms), ffn(config.intermediate_size))


FAMILIES: dict[str, Family] = {
    "llama": gated,
    "mistral": gated,
    "qwen2": gated,
    "qwen3": head_norms,
}
