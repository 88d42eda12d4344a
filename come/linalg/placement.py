"""Chooses where a least-squares problem is solved: the model's device, or the CPU if too large."""

from __future__ import annotations

import logging
from functools import cache

import torch

log = logging.getLogger(__name__)


def fits(device: torch.device, needed: int | float) -> bool:
    """Whether a GPU has this many bytes of free memory; True for other devices."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return needed <= free


def solving_device(device: torch.device, needed: int | float) -> torch.device:
    """The model's device, or the CPU if a GPU has less free memory than a problem needs.

    Args:
        device: the model's device.
        needed: peak bytes of the problem.
    """
    if fits(device, needed):
        return device
    _say_once()
    return torch.device("cpu")


@cache
def _say_once() -> None:
    log.warning(
        "the GPU's free memory is too small for some least-squares problems, which are solved on "
        "the CPU; merge.retention.tokens and merge.m make them smaller"
    )
