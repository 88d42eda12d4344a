"""Treatment of the norms before sublayers when layers are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from come.models.layer_state import LayerState, changed
from come.models.layout import Part, Role

Norms = Literal["mean", "fold"]


def check_norms(norms: str) -> Norms:
    """Raises ValueError unless `norms` is one of "mean", "fold"."""
    for allowed in get_args(Norms):
        if norms == allowed:
            return allowed
    raise ValueError(f"merge.norms={norms!r}: allowed are {', '.join(get_args(Norms))}")


def fold_norms(state: LayerState, roles: Mapping[str, Role]) -> LayerState:
    """The same layer with the scales of its norms folded into the rows that read them.

        W (g * x^ + b) + c = (W diag(g)) x^ + (c + W b)

    The scale is set to ones. A LayerNorm's bias `b` is folded too, and becomes zero, if every row
    that reads the norm has a bias `c` to absorb it. Otherwise it becomes `b / g`; a norm whose
    scale contains zeros is then left unchanged. The merge averages the scales that remain in the
    norms, and weights the biases that remain (`folded_roles`).
    Exact up to rounding to the storage dtype. Where the scale is 1 + weight, the weight is set to
    zeros. Norms after a projection, such as Qwen3's q and k norms, cannot be folded.

    Args:
        state: all tensors of one layer; not changed.
        roles: role of each tensor.

    Returns:
        All tensors of the folded layer, same shapes and dtypes, each computed when it is read.
    """
    folded: dict[str, Callable[[], Tensor]] = {}
    read = {role.norm.module: role.norm for role in roles.values() if role.norm}
    for norm in sorted(read):
        if f"{norm}.weight" not in state:
            continue  # a norm without learned parameters
        readers = [n for n, role in roles.items() if role.norm and role.norm.module == norm]
        weights = [name for name in readers if not name.endswith("bias")]
        biases = [_bias_of(name) for name in weights]
        own = state[f"{norm}.weight"]
        scale, shift = own.double() + read[norm].offset, state.get(f"{norm}.bias")
        moves_shift = shift is not None and all(bias in readers for bias in biases)
        if shift is not None and not moves_shift and bool((scale == 0).any()):
            continue
        for weight, bias in zip(weights, biases, strict=True):
            if moves_shift and shift is not None:
                folded[bias] = partial(_shifted_bias, state, weight, bias, shift, roles[weight])
            folded[weight] = partial(_scaled, state, weight, scale, roles[weight])
        folded[f"{norm}.weight"] = partial(torch.full_like, own, 1 - read[norm].offset)
        if shift is not None:
            rest = torch.zeros_like(scale) if moves_shift else shift.double() / scale
            folded[f"{norm}.bias"] = partial(rest.to, shift.dtype)
    return changed(state, folded)


def _bias_of(weight: str) -> str:
    """The name of the bias beside a weight, of a module or of experts."""
    of_module = weight.endswith(".weight")
    return weight.removesuffix("weight") + "bias" if of_module else f"{weight}_bias"


def folded_roles(roles: Mapping[str, Role]) -> dict[str, Role]:
    """The roles of folded tensors: what remains of a norm's bias is weighted like other biases."""
    return {
        name: replace(role, part=Part.SHARED)
        if role.part is Part.NORM and name.endswith(".bias")
        else role
        for name, role in roles.items()
    }


def _scaled(state: LayerState, weight: str, scale: Tensor, role: Role) -> Tensor:
    """W diag(g), computed in float32 or wider, which rounds as float64 would."""
    rows = state[weight].movedim(role.input_axis, -1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) * scale.to(wide)).to(rows.dtype).movedim(-1, role.input_axis)


def _shifted_bias(state: LayerState, weight: str, bias: str, shift: Tensor, role: Role) -> Tensor:
    """The new bias, c + W b, computed in float64."""
    own, rows = state[bias], state[weight].movedim(role.input_axis, -1)
    return (own.double() + rows.double() @ shift.double()).to(own.dtype)
