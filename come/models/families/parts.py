"""Sublayers that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.layout import Gate, LayerLayout, ModelLayout, Norm, Rows, Sublayer
from come.models.surgery import PER_LAYER_LISTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Family = Callable[["PretrainedConfig"], ModelLayout]
"""Makes the layout of a model from its configuration; raises ValueError for other variants."""
Preparation = Callable[["PreTrainedModel"], None]
"""Changes a model in place so that its layout describes it; its logits stay the same."""


INPUT_NORM = Norm("input_layernorm")
FFN_NORM = Norm("post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms over each head after the query and key projections."""


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
    axis: int = 0,
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
        axis: 1 if weights are stored as [in, out].
        others: further attributes of the sublayer.
    """
    rows = tuple(Rows(name, axis=axis) for name in inputs)
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
        gates=tuple(Gate(name, axis=axis) for name in inputs),
        output_axis=1 - axis,
        **others,
    )


def fused_attention(
    config: PretrainedConfig,
    module: str,
    projection: str,
    *,
    stacked: bool,
    groups: int | None = None,
    axis: int = 0,
    parts: int = 1,
    **others: Any,
) -> Sublayer:
    """Attention whose queries, keys and values come from one module.

    Args:
        config: the model's configuration.
        module: the attention module.
        projection: its projection of queries, keys and values.
        stacked: whether it has first all queries, then all keys, then all values; otherwise those
            of one KV group are adjacent.
        groups: number of KV groups; None for the configuration's.
        axis: 1 if weights are stored as [in, out].
        parts: see `Rows`.
        others: further arguments of `attention`.
    """
    groups, queries, head_dim = kv_groups(config, groups)
    sizes = (queries, head_dim, head_dim)
    rows = Rows(f"{module}.{projection}", sizes if stacked else (sum(sizes),), axis, parts=parts)
    base = attention(config, module=module, **others)
    return replace(base, count=groups, columns=queries, inputs=(rows,), output_axis=1 - axis)


def fused_ffn(channels: int, projection: str = "mlp.gate_up_proj", **others: Any) -> Sublayer:
    """A gated MLP with one module of all gate rows, then all up rows."""
    base = ffn(channels, inputs=(projection,), **others)
    gates = (Gate(projection), Gate(projection, start=channels))
    return replace(base, inputs=(Rows(projection, (1, 1)),), gates=gates)


def ffn_channels(config: PretrainedConfig) -> int:
    """Channels of the MLP; by default four times as many as the residual stream has."""
    for key in ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "dff"):
        if found := getattr(config, key, None):
            return int(found)
    return 4 * int(config.hidden_size)


def kv_groups(config: PretrainedConfig, groups: int | None = None) -> tuple[int, int, int]:
    """Number of KV groups, query rows of one of them, and channels of one head."""
    heads = config.num_attention_heads
    groups = groups or getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return groups, heads // groups * head_dim, head_dim


def layer_kind(config: PretrainedConfig, index: int) -> str:
    """The configuration's entries for one layer, such as its kind of attention."""
    lists: list[list[object]] = []
    for key in PER_LAYER_LISTS:
        found = getattr(config, key, None)
        if isinstance(found, list) and len(found) == config.num_hidden_layers:
            lists += [found] if found not in lists else []  # some lists have two names
    return ", ".join(str(found[index]) for found in lists)


def same_layers(config: PretrainedConfig, *sublayers: Sublayer, **others: Any) -> ModelLayout:
    """A model all of whose layers have these sublayers, and differ at most by kind."""
    kinds = [layer_kind(config, index) for index in range(config.num_hidden_layers)]
    layers = tuple(LayerLayout(sublayers, kind) for kind in kinds)
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    return ModelLayout(layers, **{"logit_cap": cap, **others})
