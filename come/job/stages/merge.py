"""The merge stage: loads the dense model, merges it in place and saves every requested depth."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from come.files import read_again, read_object, write_text
from come.job.budget import budget_line
from come.job.environment import versions
from come.job.estimate import Speed
from come.job.folder import PARTIAL_PLAN, TRIALS, partial_plan
from come.job.job import Job
from come.job.sampled_text import with_samples
from come.memory import PeakMemory, trim_heap
from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.method import Method
from come.merge.plan import BaseModel, MergeStep, Plan, SolvedTensors
from come.merge.saving import check_cache, plan_path, save_model
from come.merge.trial_scores import TrialScores
from come.models.adapter import ModelAdapter
from come.models.checkpoint import check_checkpoint, fingerprint
from come.models.loading import choose_device
from come.models.weights import remove_changed_layers
from come.models.width import UNIT_NAMES
from come.records import CalibrationResult, CompressionResult
from come.stream.processes import Processes
from come.tracking.base import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

COST = "compression.json"  # cost of the merge, for a later session that starts after it


def compresses(job: Job) -> bool:
    """Whether the job computes merges itself; several processes can share this work."""
    settings = job.settings
    given = not settings.merge.enabled or job.plan is not None or job.start is not None
    return not given and not (
        settings.distill.active and _saved_by_job(job, job.folder / job.merged)
    )


def merge(
    job: Job, trackers: Trackers, accelerator: Accelerator
) -> tuple[PreTrainedModel, Plan, Job, CompressionResult]:
    """Loads the dense model, merges it in place and saves it at every requested depth.

    An existing merged model is loaded instead, if there is one: the model of `from_run`, or, if
    the job distils, the model that an earlier session of this job has merged. With `merge=none`,
    the dense model is returned unchanged.
    """
    merged = job.folder / job.merged
    if not job.settings.merge.enabled:
        return _unmerged(job)
    if job.start is not None or (job.settings.distill.active and _saved_by_job(job, merged)):
        return _load_merged(job, job.start or merged)
    settings, method = job.settings, job.settings.merge
    cost = job.cost
    log.info("merge: %s, %d -> %d layers", method.name, job.shape.num_layers, job.target)
    earlier = partial_plan(job.folder, job.hash)
    if method.schedule.restarts:
        earlier = None  # the schedule chooses spans on the dense model, so it starts over
    if earlier is not None and earlier.base.fingerprint != fingerprint(job.checkpoint):
        earlier = None  # made from other weights, for example after an update on the hub
    if earlier is not None and method.schedule.nested:
        passed = [depth for depth in method.save_at if job.target < depth >= earlier.num_layers]
        if not all(_saved_by_job(job, job.folder / f"model-{depth}") for depth in passed):
            earlier = None  # a model that it has passed is damaged, and is made again
    if earlier is not None:
        log.info("resuming at %d layers, after %d merges", earlier.num_layers, len(earlier.steps))

    remove_changed_layers(job.folder)
    several = accelerator.num_processes > 1
    with PeakMemory(choose_device(settings.model.device)) as memory:
        model = job.load(device=str(accelerator.device) if several else None)
        if job.plan is None:
            job = replace(job, calibration=with_samples(job, model))
            trim_heap()
        began = time.perf_counter()
        spent = 0.0 if earlier is None else float(earlier.provenance.get("seconds", 0.0))

        def seconds() -> float:
            return spent + time.perf_counter() - began

        def on_step(plan: Plan) -> None:
            log.info("%s: %d layers", _described(plan), plan.num_layers)
            passed = plan.num_layers in method.save_at and plan.num_layers != job.target
            if passed and method.schedule.nested:
                save(job, model, f"model-{plan.num_layers}", plan)
            partial = replace(plan, provenance={**plan.provenance, "seconds": seconds()})
            # The checkpoint omits an intermediate downstream refit, so a crash between the writes
            # of tensors and plan never leaves missing tensors.
            if plan.num_layers != job.target:
                partial = replace(partial, downstream=SolvedTensors({}))
            partial.save(job.folder / PARTIAL_PLAN)
            _log_step(trackers, plan)

        if job.plan is not None:
            plan = _apply_plan(job, model)
            cost = replace(cost, boundary_bytes=0)
        else:
            for line in cost.lines(Speed.measured(model.device, job.shape.dtype)):
                log.info(line)
            log.info(budget_line(settings, cost))
            log.info(job.disk_line)
            plan = _compress(job, model, earlier or _empty_plan(job, model), on_step)
            if not method.schedule.nested:
                _compress_separately(job)
        elapsed = seconds()
    _check_cache(model)
    plan = replace(plan, provenance={k: v for k, v in plan.provenance.items() if k != "seconds"})
    save(job, model, job.merged, plan)
    plan.save(job.folder / "plan.json")
    compression: CompressionResult = {
        "seconds": elapsed,
        "peak_bytes": memory.peak,
        "weight_bytes": job.shape.weight_bytes,
        "boundary_bytes": cost.boundary_bytes,
        "layer_passes": 0.0 if job.plan else float(plan.provenance["layer_passes"]),
        "resumed_at": len(earlier.steps) if earlier else 0,
    }
    trackers.log({f"compression/{key}": value for key, value in compression.items()})
    if settings.distill.active:
        write_text(job.folder / COST, json.dumps(compression))
    return model, plan, job, compression


def join_merge(job: Job, accelerator: Accelerator) -> None:
    """Takes part in the merge as a worker process."""
    model = job.load(device=str(accelerator.device))
    _compress(job, model)


def _compress(
    job: Job,
    model: PreTrainedModel,
    plan: Plan | None = None,
    on_step: Callable[[Plan], None] | None = None,
) -> Plan:
    """Compresses the model with all processes; all of them use the plan of the first."""
    settings, processes = job.settings, Processes.launched()
    plan, calibration = processes.broadcast((plan, job.calibration))
    trials = TrialScores(job.folder / TRIALS, job.hash)
    processes.barrier()
    if not processes.is_main:
        trials.path = None
    assert calibration is not None
    return compress(
        model,
        calibration.windows,
        settings.merge,
        target_layers=job.target,
        stops=settings.merge.save_at,
        plan=plan,
        on_step=on_step,
        batch_size=settings.calibration.batch,
        store=settings.calibration.place,
        folder=job.folder,
        trials=trials,
        progress=processes.is_main,
        processes=processes,
    )


def save(job: Job, model: PreTrainedModel, name: str, plan: Plan) -> None:
    """Saves a model as `name` in the job folder, with the base model's other files."""
    save_model(
        model,
        job.tokenizer,
        job.folder / name,
        plan,
        base=job.checkpoint,
        shard_size=job.settings.merge.shard_size,
    )


def _unmerged(job: Job) -> tuple[PreTrainedModel, Plan, Job, CompressionResult]:
    """Loads the dense model, and returns it with an empty plan."""
    model = job.load()
    base = BaseModel.of(ModelAdapter(model), job.label, fingerprint(job.checkpoint))
    plan = Plan(base, "none", "none", provenance={"job": job.hash, "method": "none"})
    return model, plan, job, _no_cost(job)


def _read_cost(path: Path) -> CompressionResult:
    """The cost in a file of an earlier session.

    Raises:
        KeyError: a field is missing.
        TypeError, ValueError: a field is not a number.
    """
    data = read_object(path)
    return {
        "seconds": float(data["seconds"]),
        "peak_bytes": int(data["peak_bytes"]),
        "weight_bytes": int(data["weight_bytes"]),
        "boundary_bytes": int(data["boundary_bytes"]),
        "layer_passes": float(data["layer_passes"]),
        "resumed_at": int(data["resumed_at"]),
    }


def _no_cost(job: Job, merges: int = 0) -> CompressionResult:
    return {
        "seconds": 0.0,
        "peak_bytes": 0,
        "weight_bytes": job.shape.weight_bytes,
        "boundary_bytes": 0,
        "layer_passes": 0.0,
        "resumed_at": merges,
    }


def _load_merged(job: Job, folder: Path) -> tuple[PreTrainedModel, Plan, Job, CompressionResult]:
    """Loads an existing merged model with its plan, and its merge cost if this job merged it."""
    model = job.load(folder)
    plan, cost = Plan.load(plan_path(folder)), job.folder / COST
    log.info("already merged, %d layers: %s", plan.num_layers, folder)
    compression = _no_cost(job, len(plan.steps))
    if job.start is None and cost.is_file():
        compression = read_again(cost, _read_cost) or compression
    if job.start is not None:
        plan = replace(plan, provenance={**plan.provenance, "job": job.hash})
        save(job, model, job.merged, plan)
        plan.save(job.folder / "plan.json")
    return model, plan, job, compression


def _compress_separately(job: Job) -> None:
    """Compresses the dense model separately to every other depth, for schedules not `nested`."""
    settings = job.settings
    assert job.calibration is not None
    trials = TrialScores(job.folder / TRIALS, job.hash)
    for depth in settings.merge.save_at:
        folder = job.folder / f"model-{depth}"
        if depth == job.target or _saved_by_job(job, folder):
            continue
        model = job.load()
        plan = compress(
            model,
            job.calibration.windows,
            settings.merge,
            target_layers=depth,
            plan=_empty_plan(job, model),
            batch_size=settings.calibration.batch,
            store=settings.calibration.place,
            folder=job.folder,
            trials=trials,
        )
        save(job, model, folder.name, plan)
        del model


def _saved_by_job(job: Job, folder: Path) -> bool:
    """Whether an earlier session of this job has saved the complete model in this folder."""

    def read(path: Path) -> bool:
        check_checkpoint(folder)
        return bool(Plan.load(path).provenance.get("job") == job.hash)

    return bool(read_again(plan_path(folder), read))


def _empty_plan(job: Job, model: PreTrainedModel) -> Plan:
    method = job.settings.merge
    base = BaseModel.of(ModelAdapter(model), job.label, fingerprint(job.checkpoint))
    assert job.calibration is not None
    provenance = {
        "job": job.hash,
        "method": method.name,
        "changes": method.changes,
        "recipe": Method.record(method),
        "dtype": str(job.shape.dtype).removeprefix("torch."),
        "calibration": calibration_result(job),
        "versions": versions(),
    }
    return Plan(base, method.operator.name, method.norms, method.block, provenance=provenance)


def _apply_plan(job: Job, model: PreTrainedModel) -> Plan:
    """Applies the plan of `merge.plan`, and saves a model for every other depth of `save_at`."""
    plan = job.plan
    assert plan is not None
    apply(plan, model)
    for depth in job.settings.merge.save_at:
        if depth != job.target:
            shallow = plan.truncated(depth)
            save(job, apply(shallow, job.load()), f"model-{depth}", shallow)
    return plan


def _check_cache(model: PreTrainedModel) -> None:
    difference = check_cache(model)
    if model.dtype == torch.float32:
        assert difference < 1e-3, f"cached and uncached logits differ by {difference:.2g}"
    elif difference > 0.1:
        log.warning("cached and uncached logits differ by %.2g of the largest", difference)


def _log_step(trackers: Trackers, plan: Plan) -> None:
    if plan.dropped:
        return
    step = plan.steps[-1]
    trackers.log(
        {
            "merge/step": len(plan.steps),
            "merge/layers": plan.num_layers,
            "merge/first": step.first,
            "merge/last": step.last,
            "merge/score": step.score,
            "merge/share_first": step.shares[0],
        }
    )
    if len(plan.steps) == 1:
        for index, influence in enumerate(step.bi):
            trackers.log({"layer_idx": index, "layer/bi": influence})


def calibration_result(job: Job) -> CalibrationResult | None:
    """The calibration text of the job; None if the job did not calibrate."""
    windows = job.calibration
    if windows is None:
        return None
    return {
        "source": windows.source,
        "corpus_tokens": windows.corpus_tokens,
        "tokens": windows.tokens,
        "windows": len(windows.windows),
        "removed_lines": windows.removed_lines,
        "drawn_from": dict(windows.drawn_from),
        "hash": windows.hash,
    }


def _described(plan: Plan) -> str:
    """Describes the last merge step, or the dropped sublayers, in words."""
    if plan.dropped:
        return f"dropped {plan.dropped.described()}, in place of whole layers"
    step = plan.steps[-1]
    return f"{_described_step(step)} (score {step.score:.4f})"


def _described_step(step: MergeStep) -> str:
    if len(step.spans) == 1:
        counts = [
            f", {len(step.kept[unit][0])} {name}"
            for unit, name in UNIT_NAMES.items()
            if step.kept.get(unit)
        ]
        return f"fitted layer {_span(step.spans[0])} alone{''.join(counts)}"
    if step.kept_layer is not None:
        dropped = [_span(span) for i, span in enumerate(step.spans) if i != step.kept_layer]
        return f"dropped {'+'.join(dropped)}, kept {_span(step.spans[step.kept_layer])}"
    return f"merged layers {'+'.join(_span(span) for span in step.spans)} into one"


def _span(span: list[int]) -> str:
    return str(span[0]) if len(span) == 1 else f"({span[0]}..{span[-1]})"
