"""Input alignment: adapts the input projections of merged units to the merged layer's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from come.linalg.cholesky import cholesky_solve
from come.linalg.gram import Gram
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.models.layer_state import LayerState, changed
from come.models.layout import Part, Role, Sublayer
from come.models.sublayers import States

BLOCK = 2048  # rows transformed at a time


@torch.no_grad()
def input_maps(
    targets: ReconstructionTargets,
    sublayer: Sublayer,
    merged: nn.Module,
    norms: Sequence[nn.Module],
    reads: Callable[[TargetBatch], States],
    ratio: float,
) -> list[Float[Tensor, "hidden hidden"]]:
    """Linear maps from the merged layer's normed input to the normed input of each source layer.

        P_i = argmin_P sum_t c_t | P n(x_t) - n_i(x_it) |^2 + lambda mean diag(G) |P - I|^2

    x: the residual stream before the merged layer's sublayer, n its norm; x_i, n_i: those of layer
    i of the span in the current model; G = sum_t c_t n(x) n(x)^T. A unit of a deeper layer was
    trained on x_i, to which the layers in between have added their outputs. Its rows can absorb
    the part of this difference that is linear in n(x): W_i n_i(x_i) ~ (W_i P_i) n(x). The
    least-squares fit is the same for every row.

    The first token of a window has the weight c_t = seq - 1, as much as all others together. All
    other tokens attend to it, and a layer that makes it an attention sink does so through a few
    units that read it, which an unweighted mean over tokens would ignore. If all windows begin
    with the same token, its weight is 1, because a fit to that token says nothing about texts that
    begin with another one (experiments/LOG.md).

    A sublayer that reads the layer's input, such as attention, has the same input as that of the
    span's first layer, whose map is I. The other maps depend only on the targets and are cached.

    Source: this project.

    Args:
        targets: reconstruction targets of the span.
        sublayer: the sublayer whose input is meant.
        merged: the merged layer's norm before it.
        norms: the norms before it in every source layer, as the operator reads them.
        reads: returns x for a batch.
        ratio: lambda.

    Returns:
        P_i of every layer, in float32 or wider; solved in float64.
    """
    adapter, hidden = targets.stream.adapter, targets.stream.adapter.config.hidden_size
    wide = torch.promote_types(adapter.model.dtype, torch.float32)
    assert sublayer.norm is not None
    known = int(targets.layout.read_after(sublayer) is None)  # layers whose map is I
    key = sublayer.norm.module, ratio
    if known and key in targets.input_maps:
        return targets.input_maps[key]
    found = [torch.eye(hidden, dtype=wide, device=adapter.device)] * known
    norms = norms[known:]
    if not norms:
        return found
    sums = Gram(hidden, hidden * len(norms), bias=False, device=adapter.device)
    initial = targets.stream.windows[:, 0]
    first_weight = targets.stream.windows.shape[1] - 1 if (initial != initial[0]).any() else 1
    for batch in targets:
        source_inputs = batch.source_inputs(sublayer)[known:]
        normed = [n(states) for n, states in zip(norms, source_inputs, strict=True)]
        inputs = torch.cat(normed, dim=-1).flatten(0, 1)
        counts = inputs.new_ones(batch.states.shape[:2])
        counts[:, 0] = first_weight
        sums.add(merged(reads(batch)).flatten(0, 1), inputs, counts.flatten())
    sums.all_reduce(targets.stream.processes)
    penalty = ratio * sums.mean_diagonal()
    factor = sums.factor(penalty, consume=True)
    for part in sums.moment.split(hidden, dim=1):  # one layer at a time, which saves memory
        rhs = part.clone()
        rhs.diagonal().add_(penalty)
        found.append(cholesky_solve(factor, rhs).T.to(wide))
    if known:
        targets.input_maps[key] = found
    return found


def aligns(sublayer: Sublayer) -> bool:
    """Whether a sublayer's input projections can be aligned: they read a norm, unit by unit."""
    return sublayer.norm is not None and not sublayer.opaque


def fold_input_transform(
    roles: Mapping[str, Role],
    sublayer: Sublayer,
    state: LayerState,
    change: Float[Tensor, "hidden hidden"],
) -> LayerState:
    """The layer with `change` folded into the weights that read the norm: W P in place of W."""
    names = input_tensors(roles, sublayer)

    def make(name: str) -> Tensor:
        return transformed(state[name], change, roles[name])

    return changed(state, {name: partial(make, name) for name in names})


@torch.no_grad()
def fold_by_layer(
    roles: Mapping[str, Role],
    sublayer: Sublayer,
    kept: Sequence[Sequence[int]],
    state: LayerState,
    maps: Sequence[Float[Tensor, "hidden hidden"]],
) -> dict[str, Tensor]:
    """The merged layer's weights that read the norm, the units of each layer with its own map.

    Args:
        roles: role of each tensor.
        sublayer: the sublayer.
        kept: kept units of every layer.
        state: all tensors of the merged layer.
        maps: the map of every layer.
    """
    found: dict[str, Tensor] = {}
    for name in input_tensors(roles, sublayer):
        role, weight = roles[name], state[name].clone()
        start, total = 0, sum(map(len, kept))
        for units, change in zip(kept, maps, strict=True):
            own = torch.cat(role.indices(total, range(start, start + len(units))))
            rows = weight.index_select(role.axis, own.to(weight.device))
            weight.index_copy_(role.axis, own.to(weight.device), transformed(rows, change, role))
            start += len(units)
        found[name] = weight
    return found


def transformed(
    weight: Shaped[Tensor, "*shape"], change: Float[Tensor, "hidden hidden"], role: Role
) -> Shaped[Tensor, "*shape"]:
    """W P, computed in float32 or wider, in blocks of rows."""
    rows = weight.movedim(role.input_axis, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    change, found = change.to(rows.device, wide), torch.empty_like(flat)
    for start in range(0, len(flat), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = flat[part].to(wide) @ change
    return found.view(rows.shape).movedim(-1, role.input_axis)


def input_tensors(roles: Mapping[str, Role], sublayer: Sublayer) -> list[str]:
    """Names of the sublayer's weights that read its norm."""
    return [
        name
        for name, role in roles.items()
        if role.sublayer == sublayer.name and role.norm and role.part is Part.UNITS
        if not name.endswith("bias")
    ]
