"""How a training runs: steps, rates, and which windows each step sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training; everything but the objective and the text.

    Attributes:
        steps: optimiser steps.
        batch_size: windows of a step, over all processes.
        micro_batch: windows of one forward pass; gradients of a step are accumulated.
        learning_rate: at its highest.
        warmup: share of the steps in which it rises.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        patience: validations without a better one behind which training stops; 0 for never.
        seed: of the order of the windows.
        precision: "float32", or "bfloat16" for mixed precision.
    """

    steps: int
    batch_size: int = 8
    micro_batch: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    validate_every: int = 25
    checkpoint_every: int = 25
    patience: int = 0
    seed: int = 0
    precision: str = "float32"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then half a cosine down to zero."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * _falling((step - rise) / max(1, self.steps - rise))

    def rows(self, step: int, windows: int) -> Int[Tensor, " batch"]:
        """The windows of a step: one random order after another, each of all windows.

        A function of seed and step alone, so a resumed training sees what it would have seen.
        """
        first = step * self.batch_size
        chosen = []
        for place in range(first, first + self.batch_size):
            epoch, index = divmod(place, windows)
            chosen.append(_order(self.seed, epoch, windows)[index])
        return torch.stack(chosen)


def _falling(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _order(seed: int, epoch: int, windows: int) -> Int[Tensor, " windows"]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator)
