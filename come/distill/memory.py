"""Memory of a training run: weights, gradients and optimiser state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from come.distill.objectives.base import Objective
from come.distill.optimizers import state_size


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training run in bytes, without activations.

    Attributes:
        parameters: number of trained parameters.
        weights: bytes of the weights of all modules in memory; shared weights count once.
        gradients: bytes of the gradients of the trained parameters.
        optimizer: bytes of the optimiser's state of the trained parameters.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def training_memory(
    objective: Objective, others: Iterable[nn.Module] = (), optimizer: str = "adamw"
) -> TrainingMemory:
    """The training memory of an objective.

    Args:
        objective: the objective, with its trained parameters chosen.
        others: further modules in memory.
        optimizer: name of the optimiser.
    """
    return parameter_memory([objective, *others], optimizer)


def parameter_memory(modules: Iterable[nn.Module], optimizer: str) -> TrainingMemory:
    """The training memory of modules, whose parameters with `requires_grad` are trained."""
    held = {id(p): p for module in modules for p in module.parameters()}
    trained = [p for p in held.values() if p.requires_grad]
    return TrainingMemory(
        sum(p.numel() for p in trained),
        sum(p.numel() * p.element_size() for p in held.values()),
        sum(p.numel() * p.element_size() for p in trained),
        sum(state_size(optimizer, p) * p.element_size() for p in trained),
    )
