"""State space models: Mamba and Mamba-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from come.models.families.mixers import mixer, whole_mixer
from come.models.families.parts import Family, same_layers
from come.models.layout import Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from come.models.layout import ModelLayout

NORM = Norm("norm")


def mamba2(
    module: str,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    **others: Any,
) -> Sublayer:
    """A Mamba-2 mixer. Its units are groups: heads with the same B and C, and one gated norm.

    With one group, all heads share B and C, and the mixer is kept whole.

    Args:
        module: the module of the mixer.
        heads: number of heads.
        head_dim: channels of a head.
        groups: number of groups.
        state: size of the state of a channel.
        others: further arguments of `mixer` or `whole_mixer`.
    """
    if groups == 1:
        return whole_mixer(module, heads * head_dim, **others)
    others.pop("readers", None)
    own = heads // groups
    channels = own * head_dim
    per_head = (Rows(name, (own,), reads=False) for name in ("A_log", "D", "dt_bias"))
    inputs = (
        Rows("in_proj", (channels, channels, state, state, own)),
        Rows("conv1d", (channels, state, state), reads=False),
        Rows("norm", (channels,), reads=False),
        *per_head,
    )
    return mixer(module, unit="group", count=groups, columns=channels, inputs=inputs, **others)


def mamba_1(config: PretrainedConfig) -> ModelLayout:
    """Mamba and Falcon-Mamba: one mixer a layer, all of whose channels read the same B and C."""
    return _only(config, whole_mixer("mixer", config.intermediate_size, norm=NORM))


def mamba_2(config: PretrainedConfig) -> ModelLayout:
    """Mamba-2: one mixer a layer."""
    own = mamba2(
        "mixer",
        heads=config.num_heads,
        head_dim=config.head_dim,
        groups=config.n_groups,
        state=config.state_size,
        norm=NORM,
    )
    return _only(config, own)


def _only(config: PretrainedConfig, own: Sublayer) -> ModelLayout:
    """A Mamba model, each of whose layers is one mixer."""
    names = {"stack": "backbone.layers", "final_norm": "backbone.norm_f"}
    return same_layers(config, own, **names, float32_states=config.residual_in_fp32)


FAMILIES: dict[str, Family] = {
    "mamba": mamba_1,
    "falcon_mamba": mamba_1,
    "mamba2": mamba_2,
}
