"""The evaluation stage: measures the dense model and every saved model on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from come.evaluate.base import Evaluation, Metrics, read_metrics
from come.evaluate.dense import evaluate_dense
from come.files import read_again, read_object, write_text
from come.job.folder import PARTIAL_METRICS
from come.job.job import Job
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.models.checkpoint import identity
from come.models.layout import Unit
from come.records import DepthResult
from come.tracking.base import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = dict[str, Metrics]
"""Metrics of every model, by its folder in the job folder; "" is the dense model."""


class MetricCache:
    """A job's metrics so far, so that a resumed job does not measure them again.

    Args:
        path: JSON file to which the metrics of every evaluation are written atomically.
        job: hash of the job; metrics of other jobs are ignored.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self.job = job
        self.metrics: dict[str, dict[str, Any]] = read_again(path, self._read) or {}

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        data = read_object(path)
        if data["job"] != self.job:
            return {}
        metrics: dict[str, dict[str, Any]] = data["metrics"]
        for records in metrics.values():
            read_metrics(records)
        return metrics

    def get(
        self, evaluation: str, folders: Sequence[str], measure: Callable[[], dict[str, Metrics]]
    ) -> dict[str, Metrics]:
        """Metrics of the models in `folders`; measured if they are not known yet."""
        keys = {folder: f"{folder or 'dense'}: {evaluation}" for folder in folders}
        if not all(key in self.metrics for key in keys.values()):
            for folder, metrics in measure().items():
                records = {name: metric.record() for name, metric in metrics.items()}
                self.metrics[keys[folder]] = records
            write_text(self.path, json.dumps({"job": self.job, "metrics": self.metrics}))
        return {folder: read_metrics(self.metrics[key]) for folder, key in keys.items()}


def evaluate_depths(
    job: Job, model: PreTrainedModel, plan: Plan, trackers: Trackers
) -> list[DepthResult]:
    """Measures the dense model and every saved model; the dense model comes first.

    Args:
        job: the job.
        model: the job's last model: merged, distilled, or dense with `merge=none`.
        plan: its plan.
        trackers: receive all metrics.
    """
    saved = _saved(job)
    found: Found = {folder: {} for folder in ("", *(name for _, _, name in saved))}
    cache = MetricCache(job.folder / PARTIAL_METRICS, job.hash)
    _measure_dense(job, model, found, cache)
    for _, _, folder in saved:
        found[folder] |= _measure_saved(job, model, folder, found[""], cache)
    results = [_depth(job, job.shape.num_layers, "dense", "", found)]
    for depth, stage, folder in saved:
        units = plan.narrower if depth == plan.num_layers else None
        results.append(_depth(job, depth, stage, folder, found, units, _unused(job, folder)))
    for result in results:
        trackers.log(_logged(result))
    headlines = [name for name, metric in found[""].items() if metric.headline]
    rows = [
        [r["layers"], r["parameters"], r["sparsity"]]
        + [r["metrics"].get(name, {}).get("value", 0.0) for name in headlines]
        for r in results
    ]
    trackers.table("depths", ["layers", "parameters", "sparsity", *headlines], rows)
    step_rows = [
        [i + 1, s.first, s.last, str(s.spans), s.score, s.shares[0]]
        for i, s in enumerate(plan.steps)
    ]
    trackers.table("steps", ["step", "first", "last", "spans", "score", "share_first"], step_rows)
    return results


def _measure_dense(job: Job, model: PreTrainedModel, found: Found, cache: MetricCache) -> None:
    """Measures the dense model, alternating with the last model if an evaluation needs it."""
    compressed = job.settings.merge.enabled
    loaded = [] if compressed else [model]

    def load() -> PreTrainedModel:
        if not loaded:
            loaded.append(job.load(device=str(model.device)))
        return loaded[0]

    for name, (evaluation, data) in job.evaluations.items():
        if evaluation.together:
            folders = ["", "model"] if compressed else [""]

            def alternate(chosen: Evaluation = evaluation, data: Any = data) -> Found:
                models = {"": load(), "model": model} if compressed else {"": model}
                return chosen.measure_together(models, job.tokenizer, data)

            for folder, metrics in cache.get(name, folders, alternate).items():
                found[folder] |= metrics
        else:
            found[""] |= evaluate_dense(
                evaluation,
                data,
                load,
                job.tokenizer,
                identity=f"{identity(job.checkpoint)} {job.settings.model.trust_remote_code}",
                dtype=job.shape.dtype,
                device=model.device,
            )


def _measure_saved(
    job: Job, model: PreTrainedModel, folder: str, dense: Metrics, cache: MetricCache
) -> Metrics:
    """Measures a saved model; the job's last model is in memory."""
    found: Metrics = {}
    loaded = [model] if folder == "model" else []
    for name, (evaluation, data) in job.evaluations.items():
        if evaluation.together:
            continue

        def measure(chosen: Evaluation = evaluation, data: Any = data) -> Found:
            if not loaded:
                loaded.append(job.load(job.folder / folder, str(model.device)))
            own = chosen.measure_compressed(loaded[0], job.tokenizer, data, dense)
            return {folder: own}

        found |= cache.get(name, [folder], measure)[folder]
    return found


def _saved(job: Job) -> list[tuple[int, str, str]]:
    """Depth, stage and folder of every model that the job saved."""
    if not job.settings.merge.enabled:
        return []
    saved = [
        (depth, "merged", f"model-{depth}")
        for depth in sorted(job.settings.merge.save_at, reverse=True)
        if depth != job.target
    ]
    saved.append((job.target, "merged", job.merged))
    if job.settings.distill.active:
        saved.append((job.target, "distilled", "model"))
    return saved


def _unused(job: Job, folder: str) -> int:
    """Parameters of the sublayers that a saved model's plan drops one by one, or 0."""
    drops = Plan.load(plan_path(job.folder / folder)).dropped
    return drops.parameters if drops else 0


def _depth(
    job: Job,
    layers: int,
    stage: str,
    folder: str,
    found: Found,
    units: Mapping[Unit, int] | None = None,
    unused: int = 0,
) -> DepthResult:
    """The results of one model.

    `units`: where layers have fewer than the dense model's. `unused`: parameters of sublayers that
    are dropped one by one, in place of whole layers.
    """
    removed_layers, removed = job.shape.num_layers - layers, unused
    if removed_layers and not unused:
        block = job.plan.block if job.plan else job.settings.merge.block
        removed = removed_layers * job.shape.block_parameters[block]
    for unit, count in (units or {}).items():
        left_out = job.shape.layouts[0].unit_counts[unit] - count
        removed += layers * left_out * job.shape.unit_parameters[unit]
    metrics, dense = found[folder], found[""]
    if folder:
        share = removed / (job.shape.num_layers * job.shape.block_parameters["layer"])
        metrics = _compared(job, metrics, dense, share)
    return {
        "layers": layers,
        "parameters": job.shape.parameters - removed,
        "sparsity": removed / job.shape.parameters,
        "stage": stage,
        "folder": folder,
        "metrics": {name: metric.record() for name, metric in metrics.items()},
    }


def _compared(job: Job, own: Metrics, dense: Metrics, removed: float) -> Metrics:
    """The metrics of a compressed model, compared with those of the dense model."""
    compared: Metrics = {}
    for name, (evaluation, _) in job.evaluations.items():
        mine = {key: metric for key, metric in own.items() if key.partition("/")[0] == name}
        if mine:
            compared |= evaluation.compare(mine, dense, removed)
    return compared


def _logged(result: DepthResult) -> dict[str, Any]:
    """The numbers of a model for trackers, such as "eval/perplexity"."""
    logged: dict[str, Any] = {
        f"eval/{key}": result[key] for key in ("layers", "stage", "parameters", "sparsity")
    }
    for name, metric in result["metrics"].items():
        logged[f"eval/{name}"] = metric["value"]
        for key in ("low", "high"):
            if metric[key] is not None:
                logged[f"eval/{name}_{key}"] = metric[key]
        for key, value in (metric["relative"] or {}).items():
            if value is not None:
                logged[f"eval/{name}_dense_{metric['comparison']}_{key}"] = value
    return logged
