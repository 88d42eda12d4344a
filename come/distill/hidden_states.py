"""Runs a model layer by layer and collects hidden states."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from come.models.adapter import ModelAdapter
from come.models.sublayers import States, run_layer


def states_by_layer(
    model: ModelAdapter,
    ids: Tensor,
    last: int,
    keep: Collection[int],
    *,
    first: int = 0,
    states: States | None = None,
    recompute: bool = False,
) -> dict[int, States]:
    """Hidden states after some of the layers first..last, with gradients if they are enabled.

    Args:
        model: the model.
        ids: token ids of the windows, [batch, seq].
        last: the last layer to run.
        keep: the layers whose outputs are returned.
        first: the first layer to run.
        states: input of the first layer; None for the output of the embeddings.
        recompute: whether to recompute layers in the backward pass, to save memory.

    Returns:
        The states by layer index; also the input of layer `first` at `first - 1`, and the output
        of the embeddings at -1, unless `first` is 0 and `states` replaces it.
    """
    embeddings = model.model.get_input_embeddings()
    trains = torch.is_grad_enabled() and embeddings.weight.requires_grad
    embedded, keywords = model.layer_inputs(ids, gradients=trains)
    states = embedded if states is None else states
    kept = {-1: embedded, first - 1: states}
    for index in range(first, last + 1):
        layer = model.layers[index]
        if recompute and states.requires_grad:
            states = checkpoint(run_layer, layer, states, keywords[index], use_reentrant=False)
        else:
            states = run_layer(layer, states, keywords[index])
        if index in keep:
            kept[index] = states
    return kept
