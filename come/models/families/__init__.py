"""Decoder families: from a model's configuration to the layout of its layers."""

from __future__ import annotations

from difflib import get_close_matches
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
    post_norm,
    recurrent,
    rwkv,
    state_space,
    ungated,
    wrappers,
)
from come.models.families.parts import Family, Preparation
from come.models.families.refused import REFUSED

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from come.models.layout import ModelLayout

_MODULES = (
    alibi, dense, fused, latent, lfm, linear_attention, linear_attention_moe, mamba_hybrids,
    moe, moe_attention, moe_blocks, moe_post_norms, post_norm, recurrent, rwkv, state_space,
    ungated, wrappers,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    name: family for module in _MODULES for name, family in module.FAMILIES.items()
}
"""The layout of every supported model type, as a function of its configuration."""

PREPARED: dict[str, Preparation] = {**rwkv.PREPARED}
"""How models are changed whose layers differ from their layouts in transformers."""


def check_model_type(model_type: object, code: object = None) -> None:
    """Raises ValueError for an unsupported type, with the reason or what is supported.

    Args:
        model_type: `model_type` of a configuration.
        code: its `auto_map`, which names Python code of the model's repository.
    """
    name = str(model_type)
    if name == model_type and name in FAMILIES:
        return
    if name in REFUSED:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[name]}")
    close = get_close_matches(name, FAMILIES, n=3)
    similar = f" (similar: {', '.join(close)})" if close else ""
    own = " (its layers are defined by code of its repository, auto_map in config.json)"
    raise ValueError(
        f"model type {model_type!r} is not known{own if code else ''}; supported are the "
        f"{len(FAMILIES)} types{similar} in docs/families.md, and docs/extend.md tells how to add "
        "one, as one function"
    )


def layout_of(config: PretrainedConfig) -> ModelLayout:
    """The layout of the model with this configuration.

    Raises:
        ValueError: the family, or this variant of it, is not supported.
    """
    check_model_type(config.model_type)
    return FAMILIES[config.model_type](config)


def prepare(model: PreTrainedModel) -> None:
    """Changes a model in place so that its layout describes it; its logits stay the same."""
    if model.config.model_type in PREPARED:
        PREPARED[model.config.model_type](model)
