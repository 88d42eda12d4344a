"""Multi-head latent attention with a dense MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from come.models.families.mixers import Mixers, latent_attention
from come.models.families.parts import Family, ffn, same_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout, Sublayer


def latent(config: PretrainedConfig, factor: float = 1.0, **others: Any) -> ModelLayout:
    """Latent attention, then a gated MLP; a constant may multiply the output of both."""
    mlp = ffn(config.intermediate_size, factor=factor)
    return same_layers(config, latent_attention(config, factor=factor), mlp, **others)


def minicpm3(config: PretrainedConfig) -> ModelLayout:
    """MiniCPM 3, whose outputs are scaled by its number of layers."""
    # Rounded, so that it does not change with the number of layers that a cut leaves.
    factor = round(config.scale_depth / config.num_hidden_layers**0.5, 9)
    return latent(config, factor, logit_scale=config.dim_model_base / config.hidden_size)


def latent_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of DeepSeek and its relatives."""
    return [latent_attention(config)] * config.num_hidden_layers


FAMILIES: dict[str, Family] = {"minicpm3": minicpm3, "youtu": latent}

MIXERS: dict[str, Mixers] = dict.fromkeys(
    ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), latent_mixers
)
