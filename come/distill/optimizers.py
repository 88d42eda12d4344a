"""The optimisers of a training run, and the size of their states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from come.distill.config import TrainConfig

OPTIMIZERS = ("adamw", "adafactor", "sgd")
_MOMENTUM = 0.9  # of sgd


def make_optimizer(
    trained: Mapping[str, nn.Parameter], rates: Mapping[str, float], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimiser, with a group of parameters for every factor of the learning rate.

    Args:
        trained: the trained parameters, by name.
        rates: their factors of the learning rate, which each group has as "rate".
        config: name of the optimiser, learning rate and weight decay. The learning rate of
            "adafactor" is relative to the root mean square of a matrix.

    Source: AdamW, arXiv 1711.05101; Adafactor, arXiv 1804.04235; SGD with momentum 0.9.
    """
    groups = [
        {"params": [p for name, p in trained.items() if rates[name] == rate], "rate": rate}
        for rate in sorted(set(rates.values()))
    ]
    given: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, **given)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM, **given)
    assert config.optimizer == "adamw"
    return torch.optim.AdamW(groups, **given)


def state_size(optimizer: str, parameter: Tensor) -> int:
    """Numbers that an optimiser keeps for a parameter.

    AdamW keeps two moments of every parameter, SGD one, and Adafactor sums over the rows and over
    the columns of matrices.
    """
    *others, last = (1, *parameter.shape)
    if optimizer == "adafactor" and len(others) > 1:
        rows = torch.Size(others).numel()
        return rows + rows // others[-1] * last
    return {"adamw": 2, "sgd": 1, "adafactor": 1}[optimizer] * parameter.numel()
