"""The training loop, with gradient accumulation, clipping, validation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from come.distill.config import TrainConfig
from come.distill.objectives.base import Objective
from come.distill.optimizers import make_optimizer
from come.distill.progress import Progress, load_progress, save_progress
from come.distill.sharding import like, sharded_layers, whole
from come.progress import ProgressBar

Batch = tuple[Tensor, ...]
Windows = Callable[[Tensor], Batch]
"""Returns the input tensors of the objective for the windows with the given indices."""


def train(
    objective: Objective,
    windows: Windows,
    count: int,
    held_out: Windows,
    held_out_count: int,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    folder: Path,
    job: str,
    log: Callable[[Mapping[str, float | int]], None] = lambda metrics: None,
    prepare: Callable[[Tensor], None] = lambda rows: None,
    progress_bar: bool = True,
    name: str = "distill",
) -> Progress:
    """Minimises an objective and restores the weights with the lowest validation loss.

    The learning rate follows `TrainConfig.lr_at`. The first validation runs before the first
    step, so the validation loss of the result is never higher than that of the initial weights.
    Every process takes an equal share of each step's windows, so the gradient is the same as with
    one process.

    Args:
        objective: the objective; its trained parameters are changed in place.
        windows: returns training windows by index.
        count: number of training windows.
        held_out: returns validation windows by index.
        held_out_count: number of validation windows.
        config: training settings.
        accelerator: device, processes and precision.
        folder: folder for the training state. Training resumes from a state of the same job in it.
        job: identifies the run.
        log: called with the losses of every step and every validation.
        prepare: called before each step with the indices of its windows, those of all processes.
        progress_bar: whether to show a progress bar.
        name: label of the progress bar and of error messages.

    Returns:
        The loss curves, and the step of the restored weights.

    Raises:
        ValueError: the training or validation loss is not finite.
    """
    share = config.batch_size // accelerator.num_processes
    assert share * accelerator.num_processes == config.batch_size
    trained, sharded = objective.trained, bool(sharded_layers(objective))
    main = accelerator.is_main_process
    optimizer = make_optimizer(trained, objective.rates, config)
    restored = load_progress(folder, job, trained, optimizer)
    progress, best = restored or (Progress(), {})
    if progress.done:
        _restore(trained, best)
        return progress
    objective.eval()  # no dropout, as in the teacher
    model = objective if sharded else accelerator.prepare_model(objective)
    bar = ProgressBar(
        total=config.steps, initial=progress.step, desc=name, unit="step",
        shown=progress_bar and main,
    )  # fmt: skip

    def validate() -> None:
        """Computes the validation losses, and keeps the weights if they are the best so far."""
        found = _validation(objective, held_out, held_out_count, config, accelerator)
        if not math.isfinite(found["loss"]):
            raise ValueError(
                f"{name}: the validation loss is not finite after step {progress.step}; try "
                "distill.precision=float32, or lower distill.learning_rate="
                f"{config.learning_rate}"
            )
        progress.validation.append({"step": progress.step, **found})
        if found["loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = found["loss"], progress.step
            best.update({key: whole(p.detach()).cpu().clone() for key, p in trained.items()})
        log({"step": progress.step, **{f"validation_{k}": v for k, v in found.items()}})

    def should_continue() -> bool:
        """Whether steps are left and patience is not exhausted."""
        since = [v for v in progress.validation if v["step"] > progress.best_step]
        patient = not config.patience or len(since) < config.patience
        return patient and progress.step < config.steps

    with bar:
        if not progress.validation:
            validate()
        while should_continue():
            rows = config.rows(progress.step, count)
            prepare(rows)
            began = time.perf_counter()
            own = rows[accelerator.process_index * share :][:share]
            losses = _step(model, optimizer, windows, own, config, progress.step, accelerator)
            if not math.isfinite(losses["loss"]):
                raise ValueError(
                    f"{name}: the loss is not finite at step {progress.step + 1}; lower "
                    f"distill.learning_rate={config.learning_rate} or distill.clip={config.clip}"
                )
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            progress.curve.append({"step": progress.step, **losses})
            log(progress.curve[-1])
            bar.update()
            bar.set_postfix(loss=f"{losses['loss']:.4g}")
            if progress.step % config.validate_every == 0 or progress.step == config.steps:
                validate()
            if progress.step % config.checkpoint_every == 0 and (main or sharded):
                save_progress(folder, job, progress, trained, best, optimizer, write=main)
    progress.done = True
    _restore(trained, best)
    if main or sharded:
        save_progress(folder, job, progress, trained, best, None, write=main)
    return progress


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    rows: Tensor,
    config: TrainConfig,
    step: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Runs one optimiser step on this process's windows; returns mean losses of all processes."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step) * group["rate"]
    parts, layers = rows.split(config.micro_batch), sharded_layers(model)
    total: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        batch = tuple(tensor.to(accelerator.device) for tensor in windows(part))
        for layer in layers:
            layer.set_requires_gradient_sync(last)
        with nullcontext() if last or layers else accelerator.no_sync(model):
            with accelerator.autocast():
                losses = model(*batch)
            weight = len(part) / len(rows)
            accelerator.backward(losses["loss"] * weight)
        for key, value in losses.items():
            total[key] = total.get(key, 0) + value.detach().float() * weight
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {key: accelerator.reduce(value, "mean") for key, value in total.items()}
    found = {key: float(value) for key, value in means.items()}
    return {**found, "gradient_norm": float(norm), "learning_rate": config.lr_at(step)}


@torch.no_grad()
def _validation(
    objective: Objective,
    windows: Windows,
    count: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean losses over all validation windows."""
    total: dict[str, float] = {}
    for part in torch.arange(count).split(config.micro_batch):
        batch = tuple(tensor.to(accelerator.device) for tensor in windows(part))
        with accelerator.autocast():
            losses = objective.validate(*batch)
        for key, value in losses.items():
            total[key] = total.get(key, 0.0) + float(value) * len(part) / count
    return total


@torch.no_grad()
def _restore(trained: Mapping[str, torch.nn.Parameter], best: Mapping[str, Tensor]) -> None:
    for name, tensor in best.items():
        trained[name].copy_(like(tensor, trained[name]))
