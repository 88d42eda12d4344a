"""Accelerate's process state for jobs that `accelerate launch` starts in several processes."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from come.distill.accelerator import make_accelerator
from come.models.loading import choose_device
from come.schema import Settings


def processes(settings: Settings) -> Accelerator:
    """The `Accelerator` of this process, which runs alone or was started by `accelerate launch`.

    Raises:
        ValueError: several processes were launched for a job that only one can run, or
            `distill.batch_size` is not a multiple of their number.
    """
    distill = settings.distill
    device = choose_device(settings.model.device)
    if device.type == "cuda" and device.index is not None and "RANK" not in os.environ:
        torch.cuda.set_device(device)
    accelerator = make_accelerator(device.type, distill.train_config(device.type).precision)
    count = accelerator.num_processes
    if count > 1 and (not distill.active or distill.distillation().apart):
        raise ValueError(
            f"{count} processes were launched, and distill={distill.method} is for one; "
            "start python run.py without accelerate launch"
        )
    if distill.batch_size % count:
        raise ValueError(
            f"distill.batch_size={distill.batch_size}: must be a multiple of the {count} processes"
        )
    return accelerator
