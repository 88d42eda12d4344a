"""Saves and loads the state of a training run, atomically and without pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from come.distill.sharding import like, whole
from come.files import new_file, read_again, read_object, storage_errors, write_text

STATE = "state.json"


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        step: number of completed steps.
        curve: step number and losses of every step, by name.
        validation: step and losses of every validation, by name.
        best_step: step with the lowest validation loss.
        best_loss: lowest validation loss.
        seconds: training time of all steps, over all sessions.
        done: whether training has ended.
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    done: bool = False


def save_progress(
    folder: Path,
    job: str,
    progress: Progress,
    trained: Mapping[str, nn.Parameter],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    *,
    write: bool = True,
) -> None:
    """Writes weights, best weights and optimiser state, then the state file that refers to them.

    A run killed at any time leaves either the old state or the new one. With sharded parameters
    all processes must call this function, one of them with `write`.
    """
    tensors = {f"weight/{name}": whole(p.detach()).cpu() for name, p in trained.items()}
    tensors |= {f"best/{name}": tensor.cpu() for name, tensor in best.items()}
    if optimizer is not None:
        for name, parameter in trained.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = whole(value.detach()).cpu()
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = f"step-{progress.step:07d}{'-end' if progress.done else ''}.safetensors"
    # without a copy of all tensors in memory
    with new_file(folder / file) as partial, storage_errors(folder / file):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    state = {"job": job, "tensors": file, "progress": asdict(progress)}
    write_text(folder / STATE, json.dumps(state))
    for old in folder.glob("step-*.safetensors"):
        if old.name != file:
            old.unlink()


def load_progress(
    folder: Path,
    job: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Progress, dict[str, Tensor]] | None:
    """Restores the state that `save_progress` wrote for this job, in place.

    Returns:
        The progress and the best weights; None if there is no state of this job.
    """

    def read(path: Path) -> tuple[Progress, dict[str, Tensor]] | None:
        state = read_object(path)
        if state["job"] != job:
            return None
        name = str(state["tensors"])
        if not re.fullmatch(r"step-\d+(-end)?\.safetensors", name):
            raise ValueError(f"{name!r} is no file of a checkpoint")
        tensors = load_file(folder / name)
        for own, parameter in trained.items():
            for key in (f"weight/{own}", f"best/{own}"):
                if key in tensors and tensors[key].shape != parameter.shape:
                    raise ValueError(f"{name}: {key} has another shape")
            if f"weight/{own}" not in tensors:
                raise ValueError(f"{name} has no weight/{own}")
        return Progress(**state["progress"]), tensors

    found = read_again(folder / STATE, read)
    if found is None:
        return None
    progress, tensors = found
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(like(tensors[f"weight/{name}"], parameter))
            if optimizer is not None:
                own = f"optimizer/{name}/"
                optimizer.state[parameter] = {
                    key.removeprefix(own): value if key == f"{own}step" else like(value, parameter)
                    for key, value in tensors.items()
                    if key.startswith(own)
                }
    best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
    return progress, best
