"""Decoder families: from a model's configuration to the layout of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families import (
    alibi,
    dense,
    fused,
    latent,
    lfm,
    linear_attention,
    linear_attention_moe,
    mamba_hybrids,
    moe,
    moe_attention,
    moe_blocks,
    moe_post_norms,
    opt,
    post_norm,
    recurrent,
    state_space,
    ungated,
    wrappers,
)
from come.models.families.parts import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **alibi.FAMILIES,
    **fused.FAMILIES,
    **latent.FAMILIES,
    **lfm.FAMILIES,
    **linear_attention.FAMILIES,
    **linear_attention_moe.FAMILIES,
    **mamba_hybrids.FAMILIES,
    **moe.FAMILIES,
    **moe_attention.FAMILIES,
    **moe_blocks.FAMILIES,
    **moe_post_norms.FAMILIES,
    **opt.FAMILIES,
    **post_norm.FAMILIES,
    **recurrent.FAMILIES,
    **state_space.FAMILIES,
    **ungated.FAMILIES,
    **wrappers.FAMILIES,
}
"""The layout of every supported model type, as a function of its configuration."""
REFUSED: dict[str, str] = {
    **dense.REFUSED,
    **fused.REFUSED,
    **linear_attention.REFUSED,
    **mamba_hybrids.REFUSED,
    **recurrent.REFUSED,
    **moe_blocks.REFUSED,
    **wrappers.REFUSED,
}
"""Why other types are not supported."""


def check_model_type(model_type: str | None) -> None:
    """Raises ValueError, with the reason or the supported families, for an unsupported type."""
    if model_type in REFUSED and model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported; {len(FAMILIES)} types are, see "
            "docs/families.md (a family is one function in come/models/families)"
        )


def layout_of(config: PretrainedConfig) -> ModelLayout:
    """The layout of the model with this configuration.

    Raises:
        ValueError: the family, or this variant of it, is not supported.
    """
    check_model_type(config.model_type)
    return FAMILIES[config.model_type](config)
