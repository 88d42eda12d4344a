"""The processes of a job that `accelerate launch` or torchrun starts several times."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env

from come.distill.accelerator import make_accelerator
from come.models.loading import choose_device
from come.schema import Settings


def process_count() -> int:
    """Number of launched processes, from the environment; needs no process group."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1)


def processes(settings: Settings) -> Accelerator:
    """The `Accelerator` of this process, which runs alone or was started by `accelerate launch`.

    Raises:
        ValueError: several processes were launched, and the job runs in one process only, merges
            on several machines, or has a setting for one process; or `distill.batch_size` is not a
            multiple of their number.
    """
    distill, merge = settings.distill, settings.merge
    merges = merge.enabled and merge.plan is None and settings.from_run is None
    device = choose_device(settings.model.device)
    if device.type == "cuda" and device.index is not None and "RANK" not in os.environ:
        torch.cuda.set_device(device)
    accelerator = make_accelerator(device.type, distill.train_config(device.type).precision)
    count = accelerator.num_processes
    if count > 1 and distill.active and distill.distillation().layerwise:
        raise ValueError(
            f"{count} processes were launched, and distill={distill.method} is for one; "
            "start python run.py without accelerate launch"
        )
    if count > 1 and not distill.active and not merges:
        raise ValueError(
            f"{count} processes were launched, and the job neither merges nor trains; "
            "start python run.py without accelerate launch"
        )
    if count > 1 and merges and settings.calibration.store == "memory":
        raise ValueError(
            f"calibration.store=memory: {count} processes were launched, which share the hidden "
            "states in files; leave it out"
        )
    if count > 1 and merges and merge.budget.quantity:
        raise ValueError(
            f"{merge.budget}: {count} processes were launched, and the search of a shape is for "
            "one; search in one process, then merge with the merge.target_layers and merge.width "
            "of its report"
        )
    if count > 1 and ":" in settings.model.device:
        raise ValueError(
            f"model.device={settings.model.device}: {count} processes were launched, each with a "
            "device of its own; say model.device=cuda, and choose with CUDA_VISIBLE_DEVICES"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if merges and here != count:
        raise ValueError(
            f"{count} processes were launched, {here} of them on this machine, and a merge needs "
            "all on one machine; merge first, then train with from_run=FOLDER"
        )
    if distill.active and distill.batch_size % count:
        raise ValueError(
            f"distill.batch_size={distill.batch_size}: must be a multiple of the {count} processes"
        )
    return accelerator
