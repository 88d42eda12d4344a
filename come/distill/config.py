"""Training configuration: steps, learning-rate schedule, and the order of the windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run, except for the objective and the text.

    Attributes:
        steps: optimiser steps of all epochs.
        epochs: how often the windows are read.
        batch_size: windows per step, over all processes.
        micro_batch: windows per forward pass; a step accumulates the gradients.
        learning_rate: peak learning rate.
        warmup: fraction of the steps in which the learning rate warms up.
        optimizer: "adamw", "adafactor" or "sgd".
        weight_decay: weight decay of the optimiser.
        clip: maximum norm of the gradient.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        patience: number of validations without improvement after which training stops; 0 for
            never.
        seed: seed of the order of the windows.
        precision: "float32", or "bfloat16" for mixed precision.
        in_order: whether the first epoch reads the windows in their own order, because they are
            made while training runs.
    """

    steps: int
    epochs: int = 1
    batch_size: int = 8
    micro_batch: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    validate_every: int = 25
    checkpoint_every: int = 25
    patience: int = 0
    seed: int = 0
    precision: str = "float32"
    in_order: bool = False

    @property
    def windows(self) -> int:
        """Windows of the steps of an epoch."""
        return self.steps // self.epochs * self.batch_size

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: linear warmup, then cosine decay towards 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        share = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def rows(self, step: int, windows: int) -> Int[Tensor, " batch"]:
        """The indices of a step's windows; every epoch visits all windows in a new random order.

        With `in_order`, the first epoch visits them in their own order.

        The indices depend only on seed and step, so a resumed run sees the same batches.
        """
        first = step * self.batch_size
        chosen = []
        for place in range(first, first + self.batch_size):
            epoch, index = divmod(place, windows)
            ordered = self.in_order and epoch == 0
            order = torch.arange(windows) if ordered else _order(self.seed, epoch, windows)
            chosen.append(order[index])
        return torch.stack(chosen)


def _order(seed: int, epoch: int, windows: int) -> Int[Tensor, " windows"]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator)
