"""Memory of a training: weights, gradients and optimiser state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from come.distill.objectives.base import Objective

_MOMENTS = 2  # of AdamW, in the parameters' dtype


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training holds besides activations.

    Attributes:
        parameters: how many are trained.
        weights: of every module that has to be in memory, shared ones once.
        gradients: of the trained parameters.
        optimizer: AdamW's two moments of them.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def training_memory(objective: Objective, others: Iterable[nn.Module] = ()) -> TrainingMemory:
    """The memory of an objective, with the modules that it needs beside it."""
    held = {
        id(p): p.numel() * p.element_size()
        for module in (objective, *others)
        for p in module.parameters()
    }
    trained = list(objective.trained.values())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return TrainingMemory(
        sum(p.numel() for p in trained), sum(held.values()), gradients, _MOMENTS * gradients
    )
