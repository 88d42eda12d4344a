"""Sublayers of mixtures of experts, and the layers that have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.experts import Experts
from come.models.families.parts import FFN_NORM, INPUT_NORM, ffn, kv_groups
from come.models.layout import LayerLayout, ModelLayout, Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def routed(
    count: int,
    channels: int,
    *,
    block: str = "mlp",
    router: tuple[Rows, ...] = (Rows("gate"),),
    groups: int | None = 1,
    norm: Norm | None = FFN_NORM,
    factor: float = 1.0,
    stage: int = 1,
    post_norm: Norm | None = None,
    **tensors: Any,
) -> Sublayer:
    """Routed experts. A unit is an expert: its rows of the router and its part of each tensor.

    With grouped routing, where an expert can only be picked together with others of its group, all
    experts are one unit.

    Args:
        count: number of experts.
        channels: hidden activations of one expert.
        block: the module of the router and the experts.
        router: the rows of the router, relative to the block.
        groups: groups of experts that the router picks first.
        norm: the norm before the block.
        factor: constant that multiplies the output of the experts.
        stage: 1 after attention, 0 beside it.
        post_norm: the norm of the output.
        tensors: attributes of `Experts`, relative to `block.experts`.
    """
    module = f"{block}.experts"
    names = {"inputs": ("gate_up_proj",), "output": "down_proj"} | tensors
    for key in ("inputs", "input_biases"):
        names[key] = tuple(f"{module}.{name}" for name in names.get(key, ()))
    for key in ("output", "output_bias"):
        names[key] = f"{module}.{names[key]}" if names.get(key) else None
    experts = Experts(module, count, channels, **names)
    each = count if groups and groups > 1 else 1
    return Sublayer(
        name="experts",
        kind="ffn",
        unit="expert",
        count=count // each,
        norm=norm,
        inputs=tuple(replace(rows, name=f"{block}.{rows.name}", sizes=(each,)) for rows in router),
        output=module,
        columns=each * experts.width,
        post_norm=post_norm,
        factor=factor,
        stage=stage,
        silenced=((module, 0),),
        experts=experts,
    )


def shared(channels: int, module: str, **others: Any) -> Sublayer:
    """A shared expert, a gated MLP that reads every token; its units are channels.

    Args:
        channels: number of channels.
        module: the module.
        others: further attributes of the sublayer.
    """
    found = ffn(
        channels,
        inputs=(f"{module}.gate_proj", f"{module}.up_proj"),
        output=f"{module}.down_proj",
        silenced=((module, 0),),
    )
    return replace(found, name="shared_expert", unit="shared_channel", **others)


def with_rows(sublayer: Sublayer, *rows: Rows) -> Sublayer:
    """The sublayer with more rows in each of its units."""
    return replace(sublayer, inputs=(*sublayer.inputs, *rows))


def sinks(config: PretrainedConfig, name: str = "self_attn.sinks") -> Rows:
    """The attention sinks, one for each query head."""
    return Rows(name, (config.num_attention_heads // kv_groups(config)[0],), reads=False)


def opaque_attention(
    config: PretrainedConfig,
    *,
    norm: Norm | None = INPUT_NORM,
    others: tuple[str, ...] = (),
) -> Sublayer:
    """Attention whose heads are coupled, by norms over all heads for example.

    Args:
        config: the model's configuration.
        norm: the norm before it.
        others: its modules beside `self_attn`, such as a norm of its output.
    """
    groups, queries, _ = kv_groups(config)
    modules = ("self_attn", *([norm.module] if norm else []), *others)
    return Sublayer(
        name="attention",
        kind="attention",
        unit="attention",
        count=1,
        norm=norm,
        inputs=tuple(Rows(name) for name in modules),
        output="self_attn.o_proj",
        columns=groups * queries,
        silenced=(("self_attn", 2),),
        opaque=True,
    )


Sparse = Sequence[bool]
"""For every layer, whether it has experts."""


def all_sparse(config: PretrainedConfig) -> Sparse:
    """All layers."""
    return [True] * config.num_hidden_layers


def after_dense(config: PretrainedConfig) -> Sparse:
    """All layers but the first ones, by `first_k_dense_replace`."""
    return [i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)]


def listed(config: PretrainedConfig) -> Sparse:
    """By `mlp_layer_types`."""
    return [kind == "sparse" for kind in config.mlp_layer_types]


def in_steps(config: PretrainedConfig) -> Sparse:
    """Every `decoder_sparse_step`-th layer, unless it is in `mlp_only_layers`."""
    return [
        i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]


def layer_kind(config: PretrainedConfig, index: int) -> str:
    """What distinguishes a layer: its window, and its rotary embeddings if each has its own."""
    found = []
    for key in ("layer_types", "layer_rope_theta", "no_rope_layers"):
        values = getattr(config, key, None)
        if values:
            found.append(str(values[index]))
    return ", ".join(found)


def sparse_layers(
    config: PretrainedConfig,
    sparse: Sparse,
    attention: Sublayer | Callable[[int], Sublayer],
    experts: tuple[Sublayer, ...],
    dense: Sublayer | None = None,
    **others: Any,
) -> ModelLayout:
    """A model of layers with experts, and of others with one MLP.

    Args:
        config: the model's configuration.
        sparse: which layers have experts.
        attention: the attention of all layers, or of each by its index.
        experts: the routed experts, and the shared one if there is one.
        dense: the MLP of the other layers.
        others: further attributes of the model.
    """
    layers = []
    for index, has_experts in enumerate(sparse):
        own = attention if isinstance(attention, Sublayer) else attention(index)
        assert has_experts or dense is not None
        ffns = experts if has_experts or dense is None else (dense,)
        layers.append(LayerLayout((own, *ffns), layer_kind(config, index)))
    return ModelLayout(tuple(layers), **others)
