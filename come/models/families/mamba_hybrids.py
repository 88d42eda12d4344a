"""Hybrids of Mamba-2 and attention with a dense MLP."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from come.models.families.mixers import Mixers, layers_of
from come.models.families.parts import FFN_NORM, Family, attention, ffn, same_layers
from come.models.families.state_space import NORM, mamba2
from come.models.layout import Gate, Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout


def mamba_hybrid_mixer(config: PretrainedConfig, **others: Any) -> Sublayer:
    """The Mamba-2 mixer of hybrids with keys such as `mamba_n_heads`."""
    return mamba2(
        "mamba",
        heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        groups=config.mamba_n_groups,
        state=config.mamba_d_state,
        **others,
    )


def mamba_or_attention(config: PretrainedConfig, **others: Any) -> list[Sublayer]:
    """The mixer of every layer: Mamba-2, or attention where `layer_types` says so."""
    mixers = {
        "linear_attention": mamba_hybrid_mixer(config, **others),
        "full_attention": attention(config, **others),
    }
    return [mixers[kind] for kind in config.layer_types]


def bamba(config: PretrainedConfig) -> ModelLayout:
    """Bamba: Mamba-2 or attention, then an MLP."""
    mlp = hybrid_ffn(config)
    layers = [(own, mlp) for own in mamba_or_attention(config)]
    final_norm = "model.final_layernorm"
    return layers_of(layers, config.layer_types, final_norm=final_norm, returns=2)


def hybrid_ffn(config: PretrainedConfig, **others: Any) -> Sublayer:
    """The MLP of Bamba and Falcon-H1."""
    return ffn(
        config.intermediate_size,
        inputs=("feed_forward.gate_proj", "feed_forward.up_proj"),
        output="feed_forward.down_proj",
        norm=Norm("pre_ff_layernorm"),
        silenced=(("feed_forward", 0),),
        **others,
    )


def falcon_h1(config: PretrainedConfig) -> ModelLayout:
    """Falcon-H1: Mamba-2 and attention side by side, then an MLP; all outputs are scaled."""
    own = mamba_hybrid_mixer(config, readers=("in_proj",), factor=config.ssm_out_multiplier)
    beside = attention(config, factor=config.attention_out_multiplier)
    mlp = hybrid_ffn(config, factor=config.mlp_multipliers[1])
    others = {"final_norm": "model.final_layernorm", "logit_scale": config.lm_head_multiplier}
    return same_layers(config, own, beside, mlp, returns=1, **others)


def granite_mixers(config: PretrainedConfig) -> list[Sublayer]:
    """The mixer of every layer of Granite 4."""
    return mamba_or_attention(config, factor=config.residual_multiplier)


def granite_hybrid(config: PretrainedConfig) -> ModelLayout:
    """The dense form of Granite 4: Mamba-2 or attention, then an MLP with one input projection.

    Raises:
        ValueError: the model has experts.
    """
    if config.num_local_experts:
        raise ValueError(
            f"this Granite has {config.num_local_experts} experts a layer; "
            "supported is the form without experts (num_local_experts=0)"
        )
    factor, channels = config.residual_multiplier, config.shared_intermediate_size
    fused = "shared_mlp.input_linear"
    mlp = Sublayer(
        name="ffn",
        kind="ffn",
        unit="channel",
        count=channels,
        norm=FFN_NORM,
        inputs=(Rows(fused, (1, 1)),),
        output="shared_mlp.output_linear",
        factor=factor,
        stage=1,
        gates=(Gate(fused), Gate(fused, start=channels)),
        silenced=(("shared_mlp", 0),),
    )
    layers = [(own, mlp) for own in granite_mixers(config)]
    return layers_of(layers, config.layer_types, logit_scale=1 / config.logits_scaling)


def nemotron_hybrid(config: PretrainedConfig) -> ModelLayout:
    """The dense form of Nemotron-H: each layer is a Mamba-2 mixer, attention, or an MLP.

    Raises:
        ValueError: a layer is a mixture of experts.
    """
    blocks = nemotron_blocks(config)
    for index, kind in enumerate(config.layers_block_type):
        if kind not in blocks:
            raise ValueError(
                f"layer {index} of this Nemotron-H is {kind!r}; supported are {', '.join(blocks)}"
            )
    layers = [(blocks[kind],) for kind in config.layers_block_type]
    return layers_of(layers, config.layers_block_type, final_norm="model.norm_f")


def nemotron_blocks(config: PretrainedConfig) -> dict[str, Sublayer]:
    """The only sublayer of a Nemotron-H layer, by kind of layer."""
    mlp = partial(ffn, inputs=("mixer.up_proj",), output="mixer.down_proj", norm=NORM, stage=0)
    return {
        "linear_attention": mamba2(
            "mixer",
            heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            groups=config.n_groups,
            state=config.ssm_state_size,
            norm=NORM,
        ),
        "full_attention": attention(config, module="mixer", norm=NORM),
        "mlp": mlp(config.intermediate_size, silenced=(("mixer", 0),)),
    }


FAMILIES: dict[str, Family] = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite_hybrid,
    "nemotron_h": nemotron_hybrid,
}

MIXERS: dict[str, Mixers] = {"granitemoehybrid": granite_mixers}

REFUSED: dict[str, str] = {
    "jamba": "its configuration places attention and experts by periods, "
    "and cannot describe the layers that are left",
    "zamba": "its attention layers share one transformer block",
    "zamba2": "its attention layers share transformer blocks, chosen by the layer's index",
}
