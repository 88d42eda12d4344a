"""Computes buffers that checkpoints do not hold, of models that are built without weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that are on the meta device, such as those of rotary embeddings.

    Raises:
        ValueError: transformers does not set a buffer.
    """
    others: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        own = next(module.parameters(), None) is not None
        if own or "config" not in inspect.signature(type(module)).parameters:
            others.append(module)
            continue
        made = type(module)(config=model.config)
        model.set_submodule(name, made.to(device))
    if others:
        _set_buffers(model, others, device)


def _set_buffers(model: PreTrainedModel, owners: Sequence[nn.Module], device: torch.device) -> None:
    """Lets transformers set the buffers of some modules, without changing parameters."""
    from transformers import PreTrainedModel

    unset: list[tuple[str, nn.Module, str, float]] = []
    for owner in owners:
        for name, old in list(owner.named_buffers(recurse=False)):
            blank = torch.nan if old.is_floating_point() else torch.iinfo(old.dtype).min
            kept = name not in owner._non_persistent_buffers_set
            owner.register_buffer(name, torch.full_like(old, blank, device=device), kept)
            unset.append((f"{type(owner).__name__}.{name}", owner, name, blank))
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter._is_hf_initialized = True
    for module in model.modules():
        if module in owners or isinstance(module, PreTrainedModel):
            model._init_weights(module)
    for parameter in parameters:
        del parameter._is_hf_initialized
    for shown, owner, name, blank in unset:
        found = owner.get_buffer(name)
        if found.is_meta or bool((found.isnan() | (found == blank)).any()):
            raise ValueError(
                f"the buffer {shown} cannot be computed with layers on disk; "
                "take model.weights=memory"
            )
