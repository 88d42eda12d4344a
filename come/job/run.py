"""One job from settings to `result.json`: prepare, merge, distil, evaluate, report."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from come.files import write_text
from come.job.folder import PARTIAL_PLAN, STATES, TRIALS, alone, finished_result, write_result
from come.job.identity import job_hash
from come.job.processes import processes
from come.job.stages.evaluate import evaluate_depths
from come.job.stages.merge import COST, calibration_result, merge, versions
from come.job.stages.prepare import Job, prepare
from come.merge.plan import Plan, tensors_path
from come.merge.saving import plan_path
from come.records import CompressionResult, DepthResult, DistillationResult, Result
from come.report.console import show
from come.schema import Settings
from come.tracking.base import JSONL, Trackers

log = logging.getLogger(__name__)


def run(settings: Settings, folder: Path) -> Result:
    """Runs a job, or returns its result if it has finished before.

    Leaves in `folder`: resolved.yaml, metrics.jsonl, plan.json, model/ (and model-N/ for every
    depth of `merge.save_at`; without weights where `merge.save_weights` is false), report.md and
    its figures, and result.json, written last. After a distillation `model/` is the trained model
    and model-merged/ the one before it. An interrupted job resumes at its last finished merge, with
    the trial merges that it had finished, or at the last checkpoint of its training.

    Raises:
        ValueError: settings that do not fit each other, the model or the texts; before any
            weight is loaded.
    """
    settings.check()
    name, crew = job_hash(settings), processes(settings)
    if not crew.is_main_process:
        return _follow(settings, folder, name, crew)
    with alone(folder):
        return _lead(settings, folder, name, crew)


def _lead(settings: Settings, folder: Path, name: str, crew: Accelerator) -> Result:
    finished = finished_result(folder, name)
    broadcast_object_list([finished is None])  # the others wait for this
    if finished is not None:
        log.info("job %s has finished before; remove its folder to run it again", name)
        _tidy(folder, cast(Result, finished))
        show(cast(Result, finished), folder)
        return cast(Result, finished)

    job = prepare(settings, folder, name)
    from come.report.write import write_report  # plots are slow to import; a wrong job needs none

    write_text(folder / "resolved.yaml", yaml.safe_dump(settings.record(), sort_keys=False))
    with _trackers(job) as trackers:
        model, plan, job, compression = merge(job, trackers)
        crew.wait_for_everyone()
        distillation = None
        if settings.distill.active:
            from come.job.stages.distill import distill  # sharded training is slow to import

            model, plan, distillation = distill(job, model, plan, trackers, crew)
        depths = evaluate_depths(job, model, plan, trackers)
        result = _result(job, plan, compression, distillation, depths)
        for title, path in write_report(folder, result, plan, job.checkpoint).items():
            trackers.figure(title, path)
    write_result(folder, cast(dict[str, Any], result))
    _tidy(folder, result)
    show(result, folder)
    return result


def _tidy(folder: Path, result: Result) -> None:
    """Removes what a finished job has no use for: partial plans, checkpoints, unwanted weights."""
    partial = folder / PARTIAL_PLAN
    for leftover in (partial, tensors_path(partial), folder / TRIALS, folder / COST):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder / STATES, ignore_errors=True)
    if not result["settings"]["merge"]["save_weights"]:
        for depth in result["depths"][1:]:
            for weights in (folder / depth["folder"]).glob("model*.safetensors*"):
                weights.unlink()


def _follow(settings: Settings, folder: Path, name: str, crew: Accelerator) -> Result:
    """The part of a process that helps to distil: waits for the merge, and trains along."""
    (goes_on,) = broadcast_object_list([None])
    if not goes_on:
        return cast(Result, {})
    job = prepare(settings, folder, name)
    crew.wait_for_everyone()
    from come.job.stages.distill import distill

    merged = job.folder / job.merged
    model = job.load(merged, str(crew.device))
    distill(job, model, Plan.load(plan_path(merged)), Trackers(), crew)
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

        tags = [job.label, method, f"{job.target} layers"]
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
        "compression": compression,
        "calibration": calibration_result(job) or plan.provenance.get("calibration"),
        "distillation": distillation,
        "eval_source": job.held_out[""].source if job.held_out else "",
        "eval_also": {name: text.source for name, text in job.held_out.items() if name},
        "settings": job.settings.record(),
        "versions": versions(),
    }
