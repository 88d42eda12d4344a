"""Sublayers of mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from come.models.experts import Experts
from come.models.families.parts import FFN_NORM, ffn
from come.models.layout import Norm, Rows, Sublayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CORRECTED = (Rows("gate"), Rows("gate.e_score_correction_bias", reads=False))
CORRECTED_BLOCK = (Rows("gate"), Rows("e_score_correction_bias", reads=False))
"""Routers with a bias that corrects which experts are picked, in the router or beside it."""


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
    """A shared expert, a gated MLP that reads every token; its units are channels."""
    found = ffn(
        channels,
        inputs=(f"{module}.gate_proj", f"{module}.up_proj"),
        output=f"{module}.down_proj",
        silenced=((module, 0),),
        **others,
    )
    return beside_experts(found)


def beside_experts(sublayer: Sublayer) -> Sublayer:
    """An MLP of any form as a shared expert."""
    return replace(sublayer, name="shared_expert", unit="shared_channel")


def corrected_experts(
    config: PretrainedConfig,
    router: tuple[Rows, ...] = CORRECTED,
    channels: int | None = None,
) -> tuple[Sublayer, Sublayer]:
    """Experts of DeepSeek and its relatives: a router that may have groups, and a shared expert.

    Args:
        config: the model's configuration.
        router: the rows of the router.
        channels: channels of one shared expert; None for those of a routed one.
    """
    each = config.moe_intermediate_size
    number = getattr(config, "n_shared_experts", None) or config.num_shared_experts
    groups = getattr(config, "n_group", None)
    return (
        routed(experts_of(config), each, router=router, groups=groups),
        shared((channels or each) * number, "mlp.shared_experts"),
    )


def experts_of(config: PretrainedConfig) -> int:
    """Number of experts of one layer."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next(count for name in names if (count := getattr(config, name, None)))


def summed(
    experts: tuple[Sublayer, ...], module: str, before: Norm, after: Norm | None = None
) -> Sublayer:
    """Routed and shared experts as one opaque sublayer, for norms that only fit all of them.

    Args:
        experts: the experts.
        module: their block.
        before: the norm before it, which is kept with the experts.
        after: the norm of their sum; None for none.
    """
    return Sublayer(
        name="experts",
        kind="ffn",
        unit="experts",
        count=1,
        norm=before,
        inputs=(Rows(module), Rows(before.module)),
        output=module,
        columns=sum(each.width for each in experts),
        post_norm=after,
        stage=1,
        silenced=((module, 0),),
        opaque=True,
        joined=experts,
    )
