"""Hybrids of Mamba-2 and attention with a dense MLP or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from come.models.families.experts import CORRECTED, beside_experts, routed
from come.models.families.mixers import layers_of
from come.models.families.moe import granite_experts
from come.models.families.parts import Family, attention, ffn, same_layers
from come.models.families.sparse import all_sparse, sparse_layers
from come.models.families.state_space import NORM, mamba2
from come.models.layout import Norm, Sublayer

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


def granite_hybrid(config: PretrainedConfig) -> ModelLayout:
    """Granite 4: Mamba-2 or attention, then experts, a shared expert, or only the latter."""
    mixers = mamba_or_attention(config, factor=config.residual_multiplier)
    scale, experts = 1 / config.logits_scaling, granite_experts(config)
    return sparse_layers(config, all_sparse(config), mixers, experts, logit_scale=scale)


def nemotron_hybrid(config: PretrainedConfig) -> ModelLayout:
    """Nemotron-H: each layer is a Mamba-2 mixer, attention, an MLP, or experts."""
    layers = [_nemotron_layer(config, kind) for kind in config.layers_block_type]
    return layers_of(layers, config.layers_block_type, final_norm="model.norm_f")


def _nemotron_layer(config: PretrainedConfig, kind: str) -> tuple[Sublayer, ...]:
    """The sublayers of a layer of Nemotron-H."""
    if kind == "linear_attention":
        own = mamba2(
            "mixer",
            heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            groups=config.n_groups,
            state=config.ssm_state_size,
            norm=NORM,
        )
        return (own,)
    if kind == "full_attention":
        return (attention(config, module="mixer", norm=NORM),)
    if kind == "mlp":
        return (_nemotron_mlp("mixer", config.intermediate_size),)
    return _nemotron_experts(config)


def _nemotron_mlp(module: str, channels: int) -> Sublayer:
    """An MLP of Nemotron-H, without a gate."""
    return ffn(
        channels,
        inputs=(f"{module}.up_proj",),
        output=f"{module}.down_proj",
        norm=NORM,
        silenced=((module, 0),),
        stage=0,
    )


def _nemotron_experts(config: PretrainedConfig) -> tuple[Sublayer, Sublayer]:
    """Routed experts without gates, and a shared one.

    Raises:
        ValueError: routed experts read a projection of the states.
    """
    if config.moe_latent_size is not None:
        raise ValueError(
            f"the experts of this Nemotron-H read and write {config.moe_latent_size} projected "
            "channels (moe_latent_size), which is not supported"
        )
    experts = routed(
        config.n_routed_experts,
        config.moe_intermediate_size,
        block="mixer",
        router=CORRECTED,
        groups=config.n_group,
        norm=NORM,
        stage=0,
        inputs=("up_proj",),
        activation="act_fn",
    )
    mlp = _nemotron_mlp("mixer.shared_experts", config.moe_shared_expert_intermediate_size)
    return experts, beside_experts(mlp)


FAMILIES: dict[str, Family] = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite_hybrid,
    "nemotron_h": nemotron_hybrid,
}
