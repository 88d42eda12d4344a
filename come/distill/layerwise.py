"""Trains merged layers separately, in sequence or in parallel, on the teacher's hidden states."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from come.distill.accelerator import make_accelerator
from come.distill.config import TrainConfig
from come.distill.hidden_states import states_by_layer
from come.distill.memory import TrainingMemory, training_memory
from come.distill.objectives.base import Distillation, Objective, Pair
from come.distill.objectives.come_mp import OneLayer
from come.distill.progress import Progress
from come.distill.trainer import train
from come.stream.boundaries import BoundaryStore, DiskStore, MappedStates, make_store

Log = Callable[[int, Mapping[str, float | int]], None]


@torch.no_grad()
def teacher_boundaries(
    pair: Pair, ids: Int[Tensor, "windows seq"], store: BoundaryStore, batch: int
) -> dict[int, int]:
    """Stores the teacher's hidden states before and after the span of every merged layer.

    Boundary i is the input of the teacher's layer i. Other boundaries are not stored, so memory
    (or disk space) does not grow with the depth of the model.

    Returns:
        The slot of every stored boundary.
    """
    spans = [pair.history[k] for k in pair.merged]
    boundaries = sorted({span[0] for span in spans} | {span[-1] + 1 for span in spans})
    slots = {boundary: number for number, boundary in enumerate(boundaries)}
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        states = states_by_layer(
            pair.teacher, ids[rows], boundaries[-1] - 1, [b - 1 for b in boundaries]
        )
        for boundary, number in slots.items():
            store[number][rows] = states[boundary - 1]
    return slots


def train_layerwise(
    method: Distillation,
    pair: Pair,
    training: Int[Tensor, "windows seq"],
    validation: Int[Tensor, "held_out seq"],
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    folder: Path,
    job: str,
    store: str,
    workers: int,
    log: Log,
) -> tuple[dict[int, Progress], TrainingMemory]:
    """Trains every merged layer separately and writes it into the student.

    Args:
        method: the distillation method, which provides the objective of each layer.
        pair: student and teacher.
        training: training windows.
        validation: validation windows.
        config: training settings, the same for every layer.
        accelerator: device and precision of the layers that this process trains.
        folder: folder for the training states, one subfolder per layer. Finished layers are not
            trained again.
        job: identifies the run; training states of other runs are ignored.
        store: store of the teacher's hidden states, "memory" or "disk"; always on disk if
            `workers` > 1.
        workers: number of parallel processes. On CUDA they are assigned to the devices in turn.
        log: called with the layer and its losses.

    Returns:
        The progress of every layer, and the training memory of one layer.
    """
    count = len(training)
    shape = (count + len(validation), training.shape[1], pair.teacher.config.hidden_size)
    dtype, kind = pair.teacher.model.dtype, pair.teacher.device.type
    keep = make_store("disk" if workers > 1 else store, shape, dtype, folder, "teacher")
    try:
        slots = teacher_boundaries(
            pair, torch.cat([training, validation]), keep, config.micro_batch
        )
        jobs = {}
        for layer in pair.merged:
            objective = method.objective(pair, layer)
            assert isinstance(objective, OneLayer)
            for size in _sizes(config, len(validation)):
                objective.expect(pair.student, training[:1].expand(size, -1))
            span = pair.history[layer]
            ends = [
                keep.mapped(slots[boundary])
                if isinstance(keep, DiskStore)
                else keep[slots[boundary]]
                for boundary in (span[0], span[-1] + 1)
            ]
            jobs[layer] = partial(
                _train_one, objective, ends, count, config, folder / f"layer-{layer}", job
            )
            memory = training_memory(objective, optimizer=config.optimizer)
        if workers > 1:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                waiting = [
                    pool.submit(_in_process, task, number, workers, kind, config.precision)
                    for number, task in enumerate(jobs.values())
                ]
                for future in as_completed(waiting):
                    future.result()
        found: dict[int, Progress] = {}
        for layer, task in jobs.items():  # only loads layers that a worker has trained
            found[layer], state = task(accelerator=accelerator, log=partial(log, layer))
            pair.student.write(layer, state)
            for losses in found[layer].curve if workers > 1 else ():
                log(layer, losses)
        return found, memory
    finally:
        keep.close()


def _sizes(config: TrainConfig, held_out: int) -> set[int]:
    """The possible numbers of windows in a forward pass."""
    sizes = {config.micro_batch, config.batch_size % config.micro_batch}
    return {
        *sizes,
        min(config.batch_size, config.micro_batch),
        held_out % config.micro_batch,
    } - {0}


def _train_one(
    objective: Objective,
    ends: Sequence[Tensor | MappedStates],
    count: int,
    config: TrainConfig,
    folder: Path,
    job: str,
    *,
    accelerator: Accelerator,
    log: Callable[[Mapping[str, float | int]], None],
    progress_bar: bool = True,
) -> tuple[Progress, dict[str, Tensor]]:
    """Trains one layer on its boundaries; the first `count` windows train, the rest validate."""
    sides = [end.open() if isinstance(end, MappedStates) else end for end in ends]
    held_out = len(sides[0]) - count
    progress = train(
        objective,
        lambda rows: tuple(states[rows] for states in sides),
        count,
        lambda rows: tuple(states[rows + count] for states in sides),
        held_out,
        config,
        accelerator=accelerator,
        folder=folder,
        job=job,
        log=log,
        progress_bar=progress_bar,
        name=folder.name,
    )
    layer = objective.get_submodule("layer")
    return progress, {name: t.detach().cpu() for name, t in layer.state_dict().items()}


def _in_process(task: Callable, number: int, workers: int, kind: str, precision: str) -> None:
    """Runs the training of one layer in a worker, with its share of the CPU cores or a device.

    The result is passed on through the checkpoint on disk, because tensors of a process cannot be
    shared after it has ended.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if kind == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    accelerator = make_accelerator(kind, precision)
    task(accelerator=accelerator, log=lambda losses: None, progress_bar=False)


def _end_with_parent() -> None:
    """Ends this worker when its parent ends, so that it does not write while a new run resumes."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
