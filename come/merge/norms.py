"""Norms before sublayers: folded for a merge, and with scales again in the merged layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float64
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
    for norm, offset, readers in _learned_norms(state, roles):
        weights = [name for name in readers if not name.endswith("bias")]
        biases = [_bias_of(name) for name in weights]
        own = state[f"{norm}.weight"]
        scale, shift = own.double() + offset, state.get(f"{norm}.bias")
        moves_shift = shift is not None and all(bias in readers for bias in biases)
        if shift is not None and not moves_shift and bool((scale == 0).any()):
            continue
        for weight, bias in zip(weights, biases, strict=True):
            if moves_shift and shift is not None:
                folded[bias] = partial(_shifted_bias, state, weight, bias, shift, roles[weight])
            folded[weight] = partial(_scaled, state, weight, scale, roles[weight])
        folded[f"{norm}.weight"] = partial(torch.full_like, own, 1 - offset)
        if shift is not None:
            rest = torch.zeros_like(scale) if moves_shift else shift.double() / scale
            folded[f"{norm}.bias"] = partial(rest.to, shift.dtype)
    return changed(state, folded)


def balanced_norms(state: LayerState, roles: Mapping[str, Role]) -> dict[str, Tensor]:
    """The same layer with columns of about equal size in the rows that read a norm.

        W (g * x^ + b) = (W diag(1/s)) (s * g * x^ + s * b),   s_j = 2^round(log2(r_j / r))

    r_j is the root mean square of column j of all rows that read the norm, and r the geometric mean
    of all r_j. Folding leaves the norm's scales in the columns, so a format of few bits with one
    scale for a block of adjacent weights, such as llama.cpp's Q4_0, rounds small columns coarsely.
    Powers of two, from 2^-8 to 2^8, make it exact in floating point.

    Args:
        state: all tensors of one layer; not changed.
        roles: role of each tensor.

    Returns:
        All tensors of the layer, same shapes and dtypes.
    """
    found = dict(state)
    for norm, offset, readers in _learned_norms(state, roles):
        weights = [name for name in readers if not name.endswith("bias")]
        scale = _column_scales([state[n].movedim(roles[n].input_axis, -1) for n in weights])
        for name in weights:
            found[name] = _scaled(state, name, 1 / scale, roles[name])
        own = state[f"{norm}.weight"]
        found[f"{norm}.weight"] = ((own.double() + offset) * scale - offset).to(own.dtype)
        if f"{norm}.bias" in state:
            shift = state[f"{norm}.bias"]
            found[f"{norm}.bias"] = (shift.double() * scale).to(shift.dtype)
    return found


def _learned_norms(
    state: LayerState, roles: Mapping[str, Role]
) -> Iterator[tuple[str, float, list[str]]]:
    """Norms with learned scales: module, what is added to the weight, and tensors that read it."""
    read = {role.norm.module: role.norm for role in roles.values() if role.norm}
    for module in sorted(read):
        if f"{module}.weight" in state:
            readers = [n for n, role in roles.items() if role.norm and role.norm.module == module]
            yield module, read[module].offset, readers


def _column_scales(rows: Sequence[Tensor]) -> Float64[Tensor, " columns"]:
    """Powers of two proportional to the columns' root mean squares; 1 for columns of zeros."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in rows]
    squares = sum(tensor.float().square().sum(0).double() for tensor in flat)
    size = torch.as_tensor(squares).sqrt()
    used = size > 0
    logs = torch.where(used, size, 1).log2()
    logs = torch.where(used, logs - logs[used].mean(), 0) if used.any() else logs
    return torch.exp2(logs.round().clamp(-8, 8))


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
