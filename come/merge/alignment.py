"""Input alignment: adapts the input projections of merged units to the merged layer's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.linalg.cholesky import cholesky_solve
from come.linalg.gram import Gram
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.models.adapter import ModelAdapter, Unit
from come.models.layer_state import LayerState, changed
from come.models.sublayers import States

BLOCK = 2048  # rows transformed at a time


@torch.no_grad()
def input_maps(
    targets: ReconstructionTargets,
    unit: Unit,
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

    The merged layer's attention has the same input as the attention of the span's first layer, so
    that layer's map is I. The other attention maps depend only on the targets and are cached.

    Source: this project.

    Args:
        targets: reconstruction targets of the span.
        unit: kv_group for the input of the attention, channel for the input of the MLP.
        merged: the merged layer's norm before these units.
        norms: the norms before these units in every source layer, as the operator reads them.
        reads: returns x for a batch.
        ratio: lambda.

    Returns:
        P_i of every layer, in float32 or wider; solved in float64.
    """
    adapter, hidden = targets.stream.adapter, targets.stream.adapter.config.hidden_size
    wide = torch.promote_types(adapter.model.dtype, torch.float32)
    known = 1 if unit == "kv_group" else 0  # layers whose map is I
    if known and ratio in targets.input_maps:
        return targets.input_maps[ratio]
    found = [torch.eye(hidden, dtype=wide, device=adapter.device)] * known
    norms = norms[known:]
    if not norms:
        return found
    sums = Gram(hidden, hidden * len(norms), bias=False, device=adapter.device)
    initial = targets.stream.windows[:, 0]
    first_weight = targets.stream.windows.shape[1] - 1 if (initial != initial[0]).any() else 1
    for batch in targets:
        sublayer_inputs = batch.sublayer_inputs(unit)[known:]
        normed = [n(states) for n, states in zip(norms, sublayer_inputs, strict=True)]
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
        targets.input_maps[ratio] = found
    return found


def fold_input_transform(
    adapter: ModelAdapter, unit: Unit, state: LayerState, change: Float[Tensor, "hidden hidden"]
) -> LayerState:
    """The layer with `change` folded into the weights that read the norm: W P in place of W."""
    names = input_tensors(adapter, unit)

    def make(name: str) -> Tensor:
        return transformed(state[name], change)

    return changed(state, {name: partial(make, name) for name in names})


def transformed(
    rows: Float[Tensor, "rows hidden"], change: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, "rows hidden"]:
    """W P, computed in float32 or wider, in blocks of rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    change, found = change.to(rows.device, wide), torch.empty_like(rows)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = rows[part].to(wide) @ change
    return found


def input_tensors(adapter: ModelAdapter, unit: Unit) -> list[str]:
    """Names of the weights that read the norm before a kind of unit."""
    norm = adapter.norm(unit)
    return [n for n, r in adapter.roles.items() if r.norm == norm and n.endswith(".weight")]
