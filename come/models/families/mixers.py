"""Mixers other than plain attention: units of recurrences, and mixers that are kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.families.parts import INPUT_NORM
from come.models.layout import LayerLayout, ModelLayout, Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def mixer(
    module: str,
    *,
    unit: str,
    count: int,
    columns: int,
    inputs: tuple[Rows, ...],
    output: str = "out_proj",
    norm: Norm | None = INPUT_NORM,
    returns: int = 0,
    **others: Any,
) -> Sublayer:
    """A recurrence whose units, such as heads, do not read each other.

    Args:
        module: the module of the mixer.
        unit: the kind of its units.
        count: how many units it has.
        columns: input columns of its output projection per unit.
        inputs: the rows of its units, by names relative to the module.
        output: its output projection.
        norm: the norm before it.
        returns: number of values that the module returns.
        others: further attributes of the sublayer.
    """
    return Sublayer(
        name="mixer",
        kind="attention",
        unit=unit,
        count=count,
        norm=norm,
        inputs=tuple(replace(rows, name=f"{module}.{rows.name}") for rows in inputs),
        output=f"{module}.{output}",
        columns=columns,
        silenced=((module, returns),),
        **others,
    )


def whole_mixer(
    module: str,
    width: int,
    *,
    readers: Sequence[str] = (),
    output: str = "out_proj",
    norm: Norm | None = INPUT_NORM,
    returns: int = 0,
    **others: Any,
) -> Sublayer:
    """A mixer whose heads or channels are coupled: one layer's is kept as a whole.

    Args:
        module: the module of the mixer.
        width: input channels of its output projection.
        readers: its modules that read the norm, if other sublayers read that norm too; the norm
            then does not belong to the mixer.
        output: its output projection.
        norm: the norm before it.
        returns: number of values that the module returns.
        others: further attributes of the sublayer.
    """
    own = [norm.module] if norm and not readers else []
    rows = [Rows(name, reads=False) for name in (module, *own)]
    return Sublayer(
        name="mixer",
        kind="attention",
        unit="mixer",
        count=1,
        norm=norm,
        inputs=(*rows, *(Rows(f"{module}.{name}") for name in readers)),
        output=f"{module}.{output}",
        columns=width,
        silenced=((module, returns),),
        opaque=True,
        **others,
    )


def latent_attention(config: PretrainedConfig, **others: Any) -> Sublayer:
    """Multi-head latent attention: all heads read the same latent states of keys and values."""
    width = config.num_attention_heads * config.v_head_dim
    return whole_mixer("self_attn", width, **{"output": "o_proj", "returns": 2, **others})


def delta_net(
    config: PretrainedConfig, *inputs: Rows, module: str = "linear_attn", **others: Any
) -> Sublayer:
    """A gated DeltaNet; a unit is a key head with the value heads that read it.

    Args:
        config: the model's configuration.
        inputs: the rows of its input projections, by names relative to the module.
        module: the module of the mixer.
        others: further arguments of `mixer`.
    """
    _, heads, keys, values = delta_sizes(config)
    own = (
        Rows("conv1d", (keys, keys, values), reads=False),
        *(Rows(name, (heads,), reads=False) for name in ("A_log", "dt_bias")),
    )
    return mixer(
        module,
        unit="key_head",
        count=config.linear_num_key_heads,
        columns=values,
        inputs=(*inputs, *own),
        **others,
    )


def delta_sizes(config: PretrainedConfig) -> tuple[int, int, int, int]:
    """Key heads of a gated DeltaNet, and for each its value heads, key rows and value rows."""
    groups = config.linear_num_key_heads
    heads = config.linear_num_value_heads // groups
    return groups, heads, config.linear_key_head_dim, heads * config.linear_value_head_dim


def layers_of(
    layers: Sequence[tuple[Sublayer, ...]], kinds: Sequence[str] = (), **others: Any
) -> ModelLayout:
    """A model whose layers have these sublayers, and kinds if any are given."""
    named = kinds or [""] * len(layers)
    found = (LayerLayout(own, kind) for own, kind in zip(layers, named, strict=True))
    return ModelLayout(tuple(found), **others)
