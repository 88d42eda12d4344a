"""The evaluation stage: measures the dense model and every saved model on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from come.evaluate.base import Metrics
from come.evaluate.dense import evaluate_dense
from come.job.stages.prepare import Job
from come.merge.plan import Plan
from come.models.checkpoint import identity
from come.records import DepthResult
from come.tracking.base import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = dict[str, Metrics]
"""Metrics of every model, by its folder in the job folder; "" is the dense model."""


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
    _measure_dense(job, model, found)
    for _, _, folder in saved:
        alone = [e for e, _ in job.evaluations.values() if not e.together]
        at_depth = model
        if folder != "model" and alone:
            at_depth = job.load(job.folder / folder, str(model.device))
        for evaluation, data in job.evaluations.values():
            if not evaluation.together:
                found[folder] |= evaluation.measure(at_depth, job.tokenizer, data)
    results = [_depth(job, job.shape.num_layers, "dense", "", found)]
    results += [_depth(job, depth, stage, folder, found) for depth, stage, folder in saved]
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


def _measure_dense(job: Job, model: PreTrainedModel, found: Found) -> None:
    """Measures the dense model, and with it the last model where both are measured together."""
    compressed = job.settings.merge.enabled
    loaded = [] if compressed else [model]

    def load() -> PreTrainedModel:
        if not loaded:
            loaded.append(job.load(device=str(model.device)))
        return loaded[0]

    for evaluation, data in job.evaluations.values():
        if evaluation.together:
            models = {"": load(), "model": model} if compressed else {"": model}
            measured = evaluation.measure_together(models, job.tokenizer, data)
            for folder, metrics in measured.items():
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


def _depth(job: Job, layers: int, stage: str, folder: str, found: Found) -> DepthResult:
    gone, removed = job.shape.num_layers - layers, 0
    if gone:
        block = job.plan.block if job.plan else job.settings.merge.block
        removed = gone * job.shape.block_parameters[block]
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
