"""The flag `--dry-run`: shows what a job would do and need, without loading weights."""

from __future__ import annotations

from pathlib import Path

from come.job.budget import budget_line, memory_shortage, sampling_cost
from come.job.estimate import Speed
from come.job.identity import job_hash
from come.job.job import Job
from come.job.stages.prepare import prepare
from come.job.stages.shape import search_lines
from come.job.training_cost import training_lines
from come.models.loading import choose_device
from come.schema import Settings


def dry_run(settings: Settings, folder: Path) -> list[str]:
    """Checks a job as `run` does; returns lines on its steps, time, memory and disk space.

    Raises:
        ValueError: see `come.job.run.run`.
    """
    settings.check()
    job = prepare(settings, folder, job_hash(settings))
    shape, device = job.shape, choose_device(settings.model.device)
    dtype = str(shape.dtype).removeprefix("torch.")
    lines = [
        f"job {job.hash}: {job.label}, {shape.num_layers} layers, "
        f"{shape.parameters / 1e6:,.1f} M parameters, {dtype} on {device.type}",
        *(_merge(job) if settings.merge.enabled else []),
    ]
    return [
        *lines,
        *training_lines(job),
        f"evaluate: {', '.join(job.evaluations) or 'nothing'}",
        job.disk_line,
        f"the same command without --dry-run writes to {folder}",
    ]


def _merge(job: Job) -> list[str]:
    settings, method = job.settings, job.settings.merge
    if job.plan is not None:
        return [f"merge: the plan of {job.start or method.plan}, {job.target} layers"]
    device = choose_device(settings.model.device)
    text = settings.calibration.label
    if job.calibration is not None and not settings.calibration.sampled_windows:
        text = job.calibration.source
    speed, goal = Speed.measured(device, job.shape.dtype), f"{job.target} layers"
    search = search_lines(job, speed, estimated=True)
    if job.shapes:
        typical = job.shapes[len(job.shapes) // 2]
        job, goal = job.with_shape(typical), f"the chosen shape, such as {typical}"
    lines = [
        *search,
        f"merge: {method.name}, to {goal}, calibrated on {text}",
        *job.cost.lines(speed),
        budget_line(settings, job.cost),
    ]
    if (read := sampling_cost(settings, job.shape)) is not None:
        lines.append(read)
    missing = memory_shortage(settings, job.shape, job.target)
    return lines if missing is None else [*lines, f"a run would be refused: {missing}"]
