"""Input maps of merged units, made to read what the merged layer really has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.linalg.gram import Gram, Map
from come.merge.reconstruction import ReconstructionTargets, TargetBatch
from come.models.adapter import LayerState, ModelAdapter, Unit
from come.models.sublayers import States


@torch.no_grad()
def input_maps(
    goals: ReconstructionTargets,
    unit: Unit,
    merged: nn.Module,
    sources: Sequence[nn.Module],
    reads: Callable[[TargetBatch], States],
    ratio: float,
) -> list[Float[Tensor, "hidden hidden"]]:
    """What each layer of a group would have read, from what the merged layer reads.

        P_i = argmin_P sum_t c_t | P n(x_t) - n_i(x_it) |^2 + lambda mean diag(G) |P - I|^2

    x: the residual stream in front of the merged layer's block, n its norm; x_i, n_i: those of
    layer i of the group where it stood; G = sum_t c_t n(x) n(x)^T. A unit of a deeper layer was
    made for x_i, to which the layers between have added; what of that a linear map of x tells, its
    rows can take in: W_i n_i(x_i) ~ (W_i P_i) n(x). This is the least-squares fit of every row at
    once. The first token of a window counts c_t = seq - 1, as much as all others together: they all
    attend to it, and a layer that makes it the sink of attention does so through a few units that
    read it, of which a mean over tokens knows nothing. Where all windows begin with the same token
    it counts 1: that says nothing of texts that begin otherwise (experiments/LOG.md).

    Source: this project.

    Args:
        goals: of the group.
        unit: kv_group for what the attention reads, channel for what the FFN reads.
        merged: a layer with the merged layer's norms.
        sources: the layers of the group as the operator reads them.
        reads: gives x of a batch.
        ratio: lambda.

    Returns:
        P_i of every layer, float64.
    """
    adapter, hidden = goals.stream.adapter, goals.stream.adapter.config.hidden_size
    name = adapter.norm(unit)
    norm, own = merged.get_submodule(name), [layer.get_submodule(name) for layer in sources]
    sums = Gram(hidden, hidden * len(own), bias=False, device=adapter.device)
    begins = goals.stream.windows[:, 0]
    first = goals.stream.windows.shape[1] - 1 if (begins != begins[0]).any() else 1
    for goal in goals:
        wanted = [n(states) for n, states in zip(own, goal.entering[unit], strict=True)]
        targets = torch.cat(wanted, dim=-1).flatten(0, 1)
        counts = targets.new_ones(goal.states.shape[:2])
        counts[:, 0] = first
        sums.add(norm(reads(goal)).flatten(0, 1), targets, counts.flatten())
    prior = Map(torch.eye(hidden, dtype=torch.float64).repeat(len(own), 1))
    found = sums.solve(prior, ratio * sums.mean_diagonal()).weight
    return list(found.split(hidden))


def fold_input_transform(
    adapter: ModelAdapter, unit: Unit, state: LayerState, change: Float[Tensor, "hidden hidden"]
) -> LayerState:
    """A layer whose rows behind a norm read it through `change`: W P in place of W."""
    rows = {name: state[name] for name in input_tensors(adapter, unit)}
    return state | {
        name: (tensor.double() @ change.to(tensor.device)).to(tensor.dtype)
        for name, tensor in rows.items()
    }


def input_tensors(adapter: ModelAdapter, unit: Unit) -> list[str]:
    """Names of the weights that read the norm in front of a kind of unit."""
    norm = adapter.norm(unit)
    return [n for n, r in adapter.roles.items() if r.norm == norm and n.endswith(".weight")]
