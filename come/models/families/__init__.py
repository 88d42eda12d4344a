"""Decoder families: from a model's configuration to the layout of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from come.models.families import dense, moe, moe_attention, moe_blocks, moe_post_norms, opt
from come.models.families.parts import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **opt.FAMILIES,
    **moe.FAMILIES,
    **moe_attention.FAMILIES,
    **moe_blocks.FAMILIES,
    **moe_post_norms.FAMILIES,
}
"""The layout of every supported model type, as a function of its configuration."""
REFUSED: dict[str, str] = {**moe_blocks.REFUSED}
"""Why a model type is not supported, of types that were looked at."""


def check_model_type(model_type: str | None) -> None:
    """Raises ValueError, naming the supported families, for an unsupported model type."""
    if model_type in REFUSED:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(a family is one function in come/models/families)"
        )


def layout_of(config: PretrainedConfig) -> ModelLayout:
    """The layout of the model with this configuration.

    Raises:
        ValueError: the family, or this variant of it, is not supported.
    """
    check_model_type(config.model_type)
    return FAMILIES[config.model_type](config)
