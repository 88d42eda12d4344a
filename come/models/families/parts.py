"""Sublayers that several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from come.models.layout import Gate, LayerLayout, ModelLayout, Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Family = Callable[["PretrainedConfig"], ModelLayout]
"""Makes the layout of a model from its configuration; raises ValueError for other variants."""


INPUT_NORM = Norm("input_layernorm")
FFN_NORM = Norm("post_attention_layernorm")


def attention(
    config: PretrainedConfig,
    *,
    module: str = "self_attn",
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    output: str = "o_proj",
    norm: Norm | None = INPUT_NORM,
    returns: int = 2,
    **others: Any,
) -> Sublayer:
    """Attention with separate projections; its units are KV groups.

    Query head h reads KV head h // (heads / KV heads), so the query rows of a KV group are
    adjacent.

    Args:
        config: the model's configuration.
        module: the attention module.
        projections: its projections of queries, keys and values.
        output: its output projection.
        norm: the norm before it.
        returns: number of values that the module returns.
        others: further attributes of the sublayer.
    """
    groups, queries, head_dim = kv_groups(config)
    sizes = (queries, head_dim, head_dim)
    return Sublayer(
        name="attention",
        kind="attention",
        unit="kv_group",
        count=groups,
        norm=norm,
        inputs=tuple(
            Rows(f"{module}.{name}", (size,)) for name, size in zip(projections, sizes, strict=True)
        ),
        output=f"{module}.{output}",
        columns=queries,
        silenced=((module, returns),),
        **others,
    )


def ffn(
    channels: int,
    *,
    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    output: str = "mlp.down_proj",
    norm: Norm | None = FFN_NORM,
    silenced: tuple[tuple[str, int], ...] = (("mlp", 0),),
    stage: int = 1,
    **others: Any,
) -> Sublayer:
    """An MLP whose units are channels; each reads one row of every input projection.

    Args:
        channels: number of channels.
        inputs: its input projections.
        output: its output projection.
        norm: the norm before it.
        silenced: the modules that return zeros if the MLP is left out.
        stage: 1 after attention, 0 beside it.
        others: further attributes of the sublayer.
    """
    rows = tuple(Rows(name) for name in inputs)
    return Sublayer(
        name="ffn",
        kind="ffn",
        unit="channel",
        count=channels,
        norm=norm,
        inputs=rows,
        output=output,
        silenced=silenced,
        stage=stage,
        gates=tuple(Gate(name) for name in inputs),
        **others,
    )


def kv_groups(config: PretrainedConfig) -> tuple[int, int, int]:
    """Number of KV groups, query rows of one of them, and channels of one head."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return groups, heads // groups * head_dim, head_dim


def same_layers(config: PretrainedConfig, *sublayers: Sublayer, **others: Any) -> ModelLayout:
    """A model all of whose layers have these sublayers."""
    return ModelLayout((LayerLayout(sublayers),) * config.num_hidden_layers, **others)
