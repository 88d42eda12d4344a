"""The distillation stage: trains the merged model with the dense model as teacher, and saves it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from come.data.windows import TokenWindows, all_drawn
from come.distill.config import TrainConfig
from come.distill.layerwise import train_layerwise
from come.distill.memory import TrainingMemory, training_memory
from come.distill.objectives.base import Pair, StorableTeacher
from come.distill.progress import Progress
from come.distill.sharding import export_to_student, shard, uses_sharding
from come.distill.trainer import train
from come.job.folder import STATES
from come.job.job import Job
from come.job.stages.merge import save
from come.job.teacher import stored_states
from come.job.training_text import CompleteText, StreamedText, complete_text
from come.memory import trim_heap
from come.merge.plan import Plan
from come.models.adapter import ModelAdapter
from come.records import DistillationResult
from come.tracking.base import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


def distill(
    job: Job, model: PreTrainedModel, plan: Plan, trackers: Trackers, accelerator: Accelerator
) -> tuple[PreTrainedModel, Plan, DistillationResult]:
    """Trains the merged model and saves it as `model/`; `model-merged/` stays unchanged.

    Raises:
        ValueError: no layer of the model was merged from several layers.
    """
    settings = job.settings.distill
    settings.warn_unread()
    method, train_config = settings.distillation(), settings.train_config(model.device.type)
    dtype = model.dtype
    sharded, stores = uses_sharding(accelerator), settings.teacher == "stored"
    if sharded or stores:  # no device holds the whole model, or this one holds the teacher first
        model.cpu()
    if sharded or method.layerwise or train_config.precision == "float32":
        model.float()
    teacher = job.load(device="cpu" if sharded else str(accelerator.device)).requires_grad_(False)
    pair = Pair(ModelAdapter(model), ModelAdapter(teacher), plan.history)
    if not pair.merged:
        raise ValueError(
            f"distill={settings.method}: no layer was merged from several layers, so there is "
            "nothing to train"
        )
    if sharded:
        settings.check_sharded()
    with accelerator.main_process_first():  # the workers read the sampled text from the cache
        text = complete_text(job, teacher, train_config)
    held_out = settings.validation_samples
    validation, training = text.windows[:held_out], text.windows[held_out:]
    count = train_config.windows if settings.streams else len(training)
    folder = job.folder / STATES
    log.info(
        "distill: %s, %d steps of %d windows of %d tokens; %d training windows, %d for validation",
        settings.method, train_config.steps, train_config.batch_size, settings.seq_len,
        count, held_out,
    )  # fmt: skip

    def record(prefix: str, losses: Mapping[str, float | int]) -> None:
        trackers.log({f"distill/{prefix}{key}": value for key, value in losses.items()})

    if method.layerwise:
        found, memory = train_layerwise(
            method,
            pair,
            training,
            validation,
            train_config,
            accelerator=accelerator,
            folder=folder,
            job=job.hash,
            store=job.settings.calibration.place,
            workers=settings.workers,
            log=lambda layer, losses: record(f"layer_{layer}_", losses),
        )
        progress = _together(found)
    else:
        objective = method.objective(pair)
        for parameter in objective.trained.values():
            parameter.data = parameter.data.float()  # half precision would round small updates away
        states, store = None, None
        if stores:
            assert isinstance(objective, StorableTeacher)
            store = partial(stored_states, job, objective.after, accelerator)
            states = store(teacher, text.windows)
            objective.release_teacher()
            trim_heap()
            if not sharded:
                objective.to(accelerator.device)
        others = [teacher] if method.uses_teacher and states is None else []
        memory = training_memory(objective, others, settings.optimizer)
        working = shard(objective, pair, accelerator) if sharded else objective

        batches: CompleteText | StreamedText = CompleteText(text.windows, states, held_out)
        if settings.streams:
            live = None if store else teacher
            batches = StreamedText(job, model, live, store, train_config, folder, accelerator)
        progress = train(
            working,
            batches,
            count,
            CompleteText(text.windows, states),
            held_out,
            train_config,
            accelerator=accelerator,
            folder=folder,
            job=job.hash,
            log=lambda losses: record("", losses),
            prepare=batches.prepare,
        )
        if sharded:
            export_to_student(objective, working)
        method.write_back(pair)
        model.to(accelerator.device)
    result = _result(job, text, train_config, progress, memory, count, accelerator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not buffers: rotary tables stay in float32
    accelerator.free_memory()
    if accelerator.is_main_process:
        summary = {k: v for k, v in result.items() if k not in ("curve", "validation")}
        before = plan.provenance.get("distillation", {}).get("drawn_from", {})
        summary["drawn_from"] = all_drawn(before, result["drawn_from"])
        plan = replace(plan, provenance={**plan.provenance, "distillation": summary})
        save(job, model, "model", plan)
        plan.save(job.folder / "plan.json")
    return model.eval(), plan, result


def _together(found: Mapping[int, Progress]) -> Progress:
    """Combines the progress of all layers: sums seconds, and the losses of their common steps."""
    curves = [progress.curve for progress in found.values()]
    validations = [progress.validation for progress in found.values()]
    return Progress(
        step=max(progress.step for progress in found.values()),
        curve=[_sum(rows) for rows in zip(*curves, strict=False)],
        validation=[_sum(rows) for rows in zip(*validations, strict=False)],
        best_step=max(progress.best_step for progress in found.values()),
        best_loss=sum(progress.best_loss for progress in found.values()),
        seconds=sum(progress.seconds for progress in found.values()),
        done=True,
    )


def _sum(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {"step": rows[0]["step"], "loss": sum(row["loss"] for row in rows)}


def _result(
    job: Job,
    text: TokenWindows,
    train_config: TrainConfig,
    progress: Progress,
    memory: TrainingMemory,
    windows: int,
    accelerator: Accelerator,
) -> DistillationResult:
    settings = job.settings.distill
    a_step = train_config.batch_size * settings.seq_len
    tokens = progress.step * a_step
    written = f", {settings.on_policy:.0%} of training written by the model in training"
    return {
        "method": settings.method,
        "source": text.source + written if settings.on_policy else text.source,
        "drawn_from": dict(text.drawn_from),
        "tokens": tokens,
        "distinct_tokens": min(tokens, windows * settings.seq_len),
        "validation_tokens": settings.validation_samples * settings.seq_len,
        "steps": progress.step,
        "best_step": progress.best_step,
        "processes": accelerator.num_processes,
        "trained_parameters": memory.parameters,
        "weight_bytes": memory.weights,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "seconds": progress.seconds,
        "tokens_per_second": tokens / progress.seconds if progress.seconds else 0.0,
        "curve": [[row["step"] * a_step, row["loss"]] for row in progress.curve],
        "validation": [
            {"tokens": row["step"] * a_step, **{k: v for k, v in row.items() if k != "step"}}
            for row in progress.validation
        ],
    }
