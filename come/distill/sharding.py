"""Fully sharded training (FSDP): every process holds a shard of each layer."""

from __future__ import annotations

import copy
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from come.distill.objectives.base import Objective, Pair


def uses_sharding(accelerator: Accelerator) -> bool:
    """Whether several processes were launched with sharding enabled.

    An accelerate config with `distributed_type: FSDP` enables it, through ACCELERATE_USE_FSDP.
    """
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard(objective: Objective, pair: Pair, accelerator: Accelerator) -> Objective:
    """A copy of the objective with the layers of student and teacher sharded over the processes.

    A layer is gathered while it runs and resharded afterwards. Gradients and optimiser state are
    always sharded. Embeddings, final norm and head are not sharded. The objective's parameters do
    not change. The teacher's layers are sharded in place, since they are not needed unsharded
    later.

    Args:
        objective: the objective, on the CPU, with its trained parameters chosen.
        pair: its student and teacher; the teacher is on the CPU too.
        accelerator: device and processes.

    Source: torch.distributed.fsdp.fully_shard; PyTorch FSDP, arXiv 2304.11277.
    """
    teacher = pair.teacher
    kept = {id(module): module for module in teacher.model.modules()}
    own = copy.deepcopy(objective, kept)
    runs = teacher.device.type != "meta"  # else its states are stored
    layers = list(teacher.layers) if runs else []
    path = pair.student.layout.stack
    layers += list(cast(nn.ModuleList, own.get_submodule(f"student.{path}")))
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if runs:
        teacher.model.to(accelerator.device)
    return own.to(accelerator.device)


def sharded_layers(module: nn.Module) -> list[FSDPModule]:
    """The sharded layers of a module."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@torch.no_grad()
def export_to_student(objective: Objective, sharded: Objective) -> None:
    """Copies the trained parameters of a sharded copy back. All processes must call it."""
    found = sharded.trained
    for name, parameter in objective.trained.items():
        parameter.copy_(whole(found[name]))


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor; if `tensor` is sharded, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Moves an unsharded tensor to the device of `other` and shards it like `other`."""
    tensor = tensor.to(other.device)
    if isinstance(other, DTensor):
        return distribute_tensor(tensor, other.device_mesh, other.placements)
    return tensor
