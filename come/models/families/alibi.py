"""Decoders whose heads differ by the slope of their ALiBi, and so by their position in the layer.

Their attention is kept from one layer as a whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from come.models.families.changes import opaque
from come.models.families.fused import DENSE_4H, plain_mlp
from come.models.families.parts import FFN_NORM, Family, fused_attention, same_layers
from come.models.families.ungated import TRANSFORMER
from come.models.layout import Norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def bloom(config: PretrainedConfig) -> ModelLayout:
    """BLOOM: heads differ by their ALiBi slope, so attention is kept from one layer as a whole.

    Raises:
        ValueError: normed states are added to the residual stream, or maps are computed in slices.
    """
    if config.apply_residual_connection_post_layernorm:
        raise ValueError(
            "this BLOOM adds normed states to the residual stream "
            "(apply_residual_connection_post_layernorm=true), which is not supported"
        )
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise ValueError("set slow_but_exact to false: this BLOOM computes its maps in slices")
    mixer = fused_attention(
        config, "self_attention", "query_key_value", stacked=False, output="dense"
    )
    mixer = replace(opaque(mixer, "self_attention"), silenced=((mixer.output, 0),))
    mlp = replace(plain_mlp(config, DENSE_4H, FFN_NORM), silenced=tuple((n, 0) for n in DENSE_4H))
    return same_layers(config, mixer, mlp, returns=2, **TRANSFORMER)


def mpt(config: PretrainedConfig) -> ModelLayout:
    """MPT: heads differ by their ALiBi slope, so attention is kept from one layer as a whole."""
    mixer = fused_attention(
        config, "attn", "Wqkv", stacked=True, output="out_proj", norm=Norm("norm_1")
    )
    maps = ("ffn.up_proj", "ffn.down_proj")
    mlp = replace(plain_mlp(config, maps, Norm("norm_2")), silenced=tuple((n, 0) for n in maps))
    return same_layers(
        config,
        opaque(mixer, "attn"),
        mlp,
        stack="transformer.blocks",
        final_norm="transformer.norm_f",
        returns=2,
    )


FAMILIES: dict[str, Family] = {"bloom": bloom, "mpt": mpt}
