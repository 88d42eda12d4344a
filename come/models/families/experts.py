"""Sublayers of mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.experts import Experts
from come.models.families.parts import FFN_NORM, INPUT_NORM, ffn, kv_groups
from come.models.layout import Norm, Rows, Sublayer

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


def summed(experts: tuple[Sublayer, ...], module: str, before: Norm, after: Norm) -> Sublayer:
    """Routed and shared experts of which only the sum is normalised: one opaque sublayer.

    Args:
        experts: the experts.
        module: their block.
        before: the norm before it.
        after: the norm after it.
    """
    return Sublayer(
        name="experts",
        kind="ffn",
        unit="experts",
        count=1,
        norm=before,
        inputs=tuple(Rows(name) for name in (module, before.module, after.module)),
        output=module,
        columns=sum(each.width for each in experts),
        post_norm=after,
        stage=1,
        silenced=((module, 0),),
        opaque=True,
        joined=experts,
    )
