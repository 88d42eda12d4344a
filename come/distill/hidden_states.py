"""A forward pass of a whole model, layer by layer."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from come.models.adapter import ModelAdapter
from come.models.sublayers import States


def passed(
    model: ModelAdapter,
    ids: Tensor,
    last: int,
    keep: Collection[int],
    *,
    first: int = 0,
    states: States | None = None,
    recompute: bool = False,
) -> dict[int, States]:
    """Hidden states behind some of the layers first..last, with gradients where they are enabled.

    Args:
        model: the model.
        ids: the windows, [batch, seq].
        last: the last layer that runs.
        keep: the layers behind which states are wanted; -1 is the embeddings' output.
        first: the first layer that runs.
        states: its input; None for the embeddings' output.
        recompute: whether a layer runs again for the gradient, to save memory.
    """
    embedded, keywords = model.layer_inputs(ids)
    states = embedded if states is None else states
    kept = {-1: embedded, first - 1: states}
    for index in range(first, last + 1):
        layer = model.layers[index]
        if recompute and states.requires_grad:
            states = checkpoint(layer, states, use_reentrant=False, **keywords[index])
        else:
            states = layer(states, **keywords[index])
        if index in keep:
            kept[index] = states
    return kept
