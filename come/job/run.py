"""Runs one job from its settings to `result.json`: prepare, merge, distil, evaluate, report."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from come.export.publish import export_gguf, push_to_hub
from come.files import write_text
from come.job.budget import memory_shortage
from come.job.environment import machine, versions
from come.job.folder import (
    PARTIAL_METRICS,
    PARTIAL_PLAN,
    SHAPE,
    STATES,
    TRIALS,
    exclusive_lock,
    finished_result,
    remove_partial,
    write_result,
)
from come.job.identity import job_hash
from come.job.job import Job
from come.job.processes import processes
from come.job.stages.evaluate import evaluate_depths
from come.job.stages.merge import calibration_result, compresses, join_merge, merge
from come.job.stages.prepare import prepare
from come.job.stages.shape import choose_shape
from come.merge.plan import Plan, tensors_path
from come.merge.saving import plan_path
from come.merge.trial_layers import remove_trial_layers
from come.models.loading import choose_device
from come.models.weights import remove_changed_layers
from come.records import CompressionResult, DepthResult, DistillationResult, Result
from come.report.console import show
from come.schema import Settings
from come.tracking.base import JSONL, Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def run(settings: Settings, folder: Path) -> Result:
    """Runs a job, or returns its result if it has already finished.

    Writes to `folder`: resolved.yaml, metrics.jsonl, plan.json, model/ and model-N/ for every
    depth N of `merge.save_at` (without weights if `merge.save_weights` is false), report.md with
    its figures, and result.json, which is written last. With distillation, model/ is the trained
    model and model-merged/ is the merged model that it was trained from.

    An interrupted job resumes after its last finished merge and reuses the scores of its finished
    trial merges; schedules with `restarts` start the merge over. An interrupted distillation
    resumes from its last checkpoint, and an interrupted evaluation keeps the metrics of finished
    ones.

    Raises:
        ValueError: settings contradict each other or do not fit the model or the texts, which is
            checked before any weights are loaded; or a result is not finite; or the finished
            model cannot be exported or uploaded.
    """
    settings.check()
    name, accelerator = job_hash(settings), processes(settings)
    if not accelerator.is_main_process:
        return _run_worker(settings, folder, name, accelerator)
    with exclusive_lock(folder):
        result = _run_main(settings, folder, name, accelerator)
        publish(settings, folder)
        return result


def _run_main(settings: Settings, folder: Path, name: str, accelerator: Accelerator) -> Result:
    remove_partial(folder)
    finished = finished_result(folder, name)
    broadcast_object_list([finished is None])  # the worker processes wait for this
    if finished is not None:
        log.info("job %s is already finished; remove its folder to run it again", name)
        _clean_up(folder, cast(Result, finished))
        show(cast(Result, finished), folder)
        return cast(Result, finished)

    remove_trial_layers(folder, name)
    job = prepare(settings, folder, name)
    merged = job.plan is not None or (folder / job.merged).exists()
    if settings.merge.enabled and not merged:
        missing = memory_shortage(job.settings, job.shape, job.target)
        if missing is not None:
            raise ValueError(missing)
    broadcast_object_list([compresses(job), job.settings.model, job.settings.calibration])
    accelerator.wait_for_everyone()  # all processes check free memory before any uses it
    import come.report.write  # noqa: F401 - matplotlib is slow; import it after the checks

    write_text(folder / "resolved.yaml", yaml.safe_dump(settings.record(), sort_keys=False))
    with _trackers(job) as trackers:
        state = State(job, accelerator, trackers)
        for stage in STAGES:
            stage(state)
    result = state.result
    assert result is not None
    write_result(folder, cast(dict[str, Any], result))
    _clean_up(folder, result)
    show(result, folder)
    return result


@dataclass
class State:
    """The results of a job's stages so far; every stage reads and extends them."""

    job: Job
    accelerator: Accelerator
    trackers: Trackers
    model: PreTrainedModel | None = None
    plan: Plan | None = None
    compression: CompressionResult | None = None
    distillation: DistillationResult | None = None
    depths: list[DepthResult] = field(default_factory=list)
    result: Result | None = None


def _choose_shape(state: State) -> None:
    """Chooses depth and width for `merge.budget`. Resumes from the trials made so far."""
    state.job = choose_shape(state.job)


def _merge(state: State) -> None:
    """Merges, or loads a merged model; leaves `model/`, or `model-merged/` before a distillation.

    Resumes from the partial plan and the scores of trial merges.
    """
    state.model, state.plan, state.job, state.compression = merge(
        state.job, state.trackers, state.accelerator
    )
    state.accelerator.wait_for_everyone()


def _distill(state: State) -> None:
    """Trains the merged layers; leaves `model/`. Resumes from the last training checkpoint."""
    if not state.job.settings.distill.active:
        return
    from come.job.stages.distill import distill  # sharded training is slow to import

    assert state.model is not None
    assert state.plan is not None
    state.model, state.plan, state.distillation = distill(
        state.job, state.model, state.plan, state.trackers, state.accelerator
    )


def _evaluate(state: State) -> None:
    """Measures the dense model and all saved ones. Resumes from the metrics measured so far."""
    assert state.model is not None
    assert state.plan is not None
    log.info("evaluate: %s", ", ".join(state.job.evaluations) or "nothing")
    state.depths = evaluate_depths(state.job, state.model, state.plan, state.trackers)


def _report(state: State) -> None:
    """Writes figures, report and model cards."""
    from come.report.write import write_report

    assert state.plan is not None
    assert state.compression is not None
    state.result = _result(
        state.job, state.plan, state.compression, state.distillation, state.depths
    )
    figures = write_report(state.job.folder, state.result, state.plan, state.job.checkpoint)
    for title, path in figures.items():
        state.trackers.figure(title, path)


STAGES = (_choose_shape, _merge, _distill, _evaluate, _report)
"""The stages of a job after its preparation, in order."""


def _clean_up(folder: Path, result: Result) -> None:
    """Removes a finished job's partial files and training checkpoints, and weights if not saved."""
    partial = folder / PARTIAL_PLAN
    leftovers = [folder / name for name in (PARTIAL_PLAN, TRIALS, SHAPE, PARTIAL_METRICS)]
    for leftover in (*leftovers, tensors_path(partial)):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder / STATES, ignore_errors=True)
    remove_changed_layers(folder)
    remove_trial_layers(folder)
    if not result["settings"]["merge"]["save_weights"]:
        for depth in result["depths"][1:]:
            for weights in (folder / depth["folder"]).glob("model*.safetensors*"):
                weights.unlink()


def publish(settings: Settings, folder: Path) -> None:
    """Exports and uploads the model of a finished job, as `export` and `hub` say."""
    if settings.export.format == "gguf":
        for kind in settings.export.types:
            export_gguf(folder, kind, settings.export.converter)
    if settings.hub.push is not None:
        push_to_hub(folder, settings.hub.push, private=settings.hub.private)


def _run_worker(settings: Settings, folder: Path, name: str, accelerator: Accelerator) -> Result:
    """Runs a worker process, which takes part in the main process's merge and training."""
    (should_continue,) = broadcast_object_list([None])
    if not should_continue:
        return cast(Result, {})
    job = prepare(settings, folder, name)
    merging, model, calibration = broadcast_object_list([None, None, None])
    if merging:
        placed = replace(settings, model=model, calibration=calibration)
        if (missing := memory_shortage(placed, job.shape, job.target)) is not None:
            raise ValueError(missing)
    accelerator.wait_for_everyone()
    if merging:
        join_merge(replace(job, settings=placed), accelerator)
    accelerator.wait_for_everyone()
    if not settings.distill.active:
        return cast(Result, {})
    from come.job.stages.distill import distill

    merged = job.folder / job.merged
    model = job.load(merged, str(accelerator.device))
    distill(job, model, Plan.load(plan_path(merged)), Trackers(), accelerator)
    return cast(Result, {})


def _trackers(job: Job) -> Trackers:
    trackers: list[Any] = [JSONL(job.folder / "metrics.jsonl")]
    tracking, merge, distill = job.settings.tracking, job.settings.merge, job.settings.distill
    method = job.plan.provenance.get("method", merge.name) if job.plan else merge.name
    group = tracking.group or f"{job.label}-{method}"
    common: dict[str, Any] = {
        "run_id": job.hash,
        "project": tracking.project,
        "config": job.settings.record(),
    }
    if tracking.backend == "wandb":
        from come.tracking.wandb import WandB

        size = str(merge.budget) if job.shapes else f"{job.target} layers"
        tags = [job.label, method, size]
        tags += [] if job.plan else [f"m={merge.m}"]
        merges = merge.enabled and job.start is None
        kind = "distill" if distill.active else "compress" if merges else "evaluate"
        trackers.append(
            WandB(
                job.folder,
                group=group,
                job_type=kind,
                mode=tracking.mode,
                tags=[*tags, distill.method] if distill.active else tags,
                **common,
            )
        )
    elif tracking.backend == "trackio":
        from come.tracking.trackio import Trackio

        trackers.append(Trackio(group=group, **common))
    return Trackers(*trackers)


def _result(
    job: Job,
    plan: Plan,
    compression: CompressionResult,
    distillation: DistillationResult | None,
    depths: list[DepthResult],
) -> Result:
    return {
        "job": job.hash,
        "model": job.label,
        "method": plan.provenance.get("method", job.settings.merge.name),
        "changes": plan.provenance.get("changes", []),
        "plan": plan.hash,
        "merge_history": plan.history,
        "depths": depths,
        "shape": job.shape_search,
        "compression": compression,
        "calibration": calibration_result(job) or plan.provenance.get("calibration"),
        "distillation": distillation,
        "settings": job.settings.record(),
        "versions": versions(),
        "machine": machine(choose_device(job.settings.model.device), job.shape.dtype),
        "command": job.settings.command,
    }
