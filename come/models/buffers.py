"""Computes buffers that checkpoints do not hold, of models that are built without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that are on the meta device, such as those of rotary embeddings.

    Those that a checkpoint holds stay without values. Parameters on the meta device do not change.

    Raises:
        ValueError: transformers does not set a buffer.
    """
    from transformers import PreTrainedModel

    saved, made, owners = model.state_dict().keys(), [], set()
    for prefix, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                owners.add(module)
                setattr(module, name, torch.full_like(buffer, _blank(buffer), device=device))
                made += [] if f"{prefix}.{name}" in saved else [(prefix, module, name)]
    for module in model.modules():  # a model may set buffers of its layers
        if owners and (module in owners or isinstance(module, PreTrainedModel)):
            model._init_weights(module)
    for prefix, module, name in made:
        found = module.get_buffer(name)
        if _blank(found) and bool((found.isnan() | (found == _blank(found))).any()):
            raise ValueError(
                f"the buffer {prefix}.{name} cannot be computed with layers on disk; "
                "take model.weights=memory"
            )


def _blank(buffer: Tensor) -> float:
    """A value that no buffer of this dtype has; 0 if there is none."""
    if buffer.is_floating_point():
        return torch.nan
    return torch.iinfo(buffer.dtype).min if buffer.dtype != torch.bool else 0
