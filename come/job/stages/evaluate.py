"""The evaluation stage: measures the dense model and every saved model on the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from come.evaluate.dense import Evaluation, evaluate, evaluate_dense
from come.evaluate.paired import mean_difference, paired_difference
from come.evaluate.perplexity import Perplexity
from come.evaluate.speed import Speed, compare_speed
from come.evaluate.zero_shot import headline
from come.job.stages.prepare import Job
from come.merge.plan import Plan
from come.models.checkpoint import identity
from come.records import (
    DepthResult,
    Difference,
    PerplexityResult,
    SpeedResult,
    TaskResult,
    ZeroShotResult,
)
from come.tracking.base import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_depths(
    job: Job, model: PreTrainedModel, plan: Plan, trackers: Trackers
) -> list[DepthResult]:
    """Measures the dense model and every saved model; the dense model comes first."""
    settings = job.settings.eval
    batch_tokens, new_tokens = settings.batch_tokens, settings.continuation_tokens
    saved = _saved(job)
    dense_model: list[PreTrainedModel] = [] if saved else [model]

    def load_dense() -> PreTrainedModel:
        if not dense_model:
            dense_model.append(job.load())
        return dense_model[0]

    dense = evaluate_dense(
        load_dense,
        job.tokenizer,
        job.held_out,
        job.tasks,
        identity=f"{identity(job.checkpoint)} {job.settings.model.trust_remote_code}",
        dtype=job.shape.dtype,
        device=model.device,
        batch_tokens=batch_tokens,
        new_tokens=new_tokens,
    )
    speeds: dict[str, Speed] = {}
    if settings.speed:
        speeds = compare_speed(
            {"dense": load_dense(), "model": model} if saved else {"dense": model},
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            batch=settings.speed_batch,
            repeats=settings.repeats,
        )
    dense_model.clear()
    measures = bool(job.held_out or job.tasks or new_tokens)
    results = [_depth(job, job.shape.num_layers, ("dense", ""), dense, dense, speeds)]
    for depth, stage, name in saved:
        at_depth = model
        if name != "model" and measures:
            at_depth = job.load(job.folder / name, str(model.device))
        found = evaluate(
            at_depth,
            job.tokenizer,
            job.held_out,
            job.tasks,
            batch_tokens=batch_tokens,
            new_tokens=new_tokens,
        )
        results.append(_depth(job, depth, (stage, name), found, dense, speeds))
    for result in results:
        _log_depth(trackers, result)
    columns = ["layers", "parameters", "sparsity", "perplexity", "ratio"]
    rows = [
        [r["layers"], r["parameters"], r["sparsity"]]
        + ([r["perplexity"]["value"], r["perplexity"]["ratio"]] if r["perplexity"] else [0.0, 0.0])
        for r in results
    ]
    trackers.table("depths", columns, rows)
    step_rows = [
        [i + 1, s.first, s.last, str(s.spans), s.score, s.shares[0]]
        for i, s in enumerate(plan.steps)
    ]
    trackers.table("steps", ["step", "first", "last", "spans", "score", "share_first"], step_rows)
    return results


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


def _depth(
    job: Job,
    layers: int,
    place: tuple[str, str],
    found: Evaluation,
    dense: Evaluation,
    speeds: dict[str, Speed],
) -> DepthResult:
    stage, folder = place
    gone, removed = job.shape.num_layers - layers, 0
    if gone:
        block = job.plan.block if job.plan else job.settings.merge.block
        removed = gone * job.shape.block_parameters[block]
    result: DepthResult = {
        "layers": layers,
        "parameters": job.shape.parameters - removed,
        "sparsity": removed / job.shape.parameters,
        "stage": stage,
        "folder": folder,
        "perplexity": None,
        "also": {},
        "speed": None,
        "zero_shot": _zero_shot(found, dense),
        "continuations": found.continuations,
    }
    for name, own in found.perplexity.items():
        on_text = _perplexity(own, dense.perplexity[name])
        if name:
            result["also"][name] = on_text
        else:
            result["perplexity"] = on_text
    speed, reference = speeds.get(folder or "dense"), speeds.get("dense")
    if speed is not None and reference is not None:
        all_layers = job.shape.num_layers * job.shape.block_parameters["layer"]
        result["speed"] = _speed(speed, reference, removed / all_layers)
    return result


def _perplexity(own: Perplexity, dense: Perplexity) -> PerplexityResult:
    interval, ratio = own.interval, own.ratio_to(dense)
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "tokens": own.tokens,
        "windows": len(own.nll),
        "nll": list(own.nll),
    }


def _speed(own: Speed, dense: Speed, gone: float) -> SpeedResult:
    """Speed relative to dense; `gone` is the removed share of the layers' parameters."""
    prompt = own.prompt.tokens_per_second / dense.prompt.tokens_per_second
    generation = own.generation.tokens_per_second / dense.generation.tokens_per_second
    return {
        "prompt": own.prompt.tokens_per_second,
        "prompt_spread": list(own.prompt.spread),
        "prompt_ratio": prompt,
        "prompt_realised": (1 - 1 / prompt) / gone if gone else 0.0,
        "generation": own.generation.tokens_per_second,
        "generation_spread": list(own.generation.spread),
        "generation_ratio": generation,
        "generation_realised": (1 - 1 / generation) / gone if gone else 0.0,
        "peak_bytes": own.peak_bytes,
        "cache_bytes": own.cache_bytes,
    }


def _zero_shot(found: Evaluation, dense: Evaluation) -> ZeroShotResult | None:
    """Results of the zero-shot tasks, each paired with the dense model's on the same documents."""
    own, reference = found.zero_shot, dense.zero_shot
    if own is None or reference is None:
        return None
    tasks: dict[str, TaskResult] = {}
    for name, metrics in own.metrics.items():
        scores, others = own.scores[name], reference.scores[name]
        gap = paired_difference(scores, others) if scores and others else None
        tasks[name] = {
            "documents": own.documents[name],
            "metric": headline(metrics),
            "value": own.value(name),
            "stderr": metrics.get(f"{headline(metrics)}_stderr"),
            "metrics": metrics,
            "scores": scores,
            "difference": own.value(name) - reference.value(name),
            "difference_low": gap.low if gap else None,
            "difference_high": gap.high if gap else None,
            "mcnemar_p": gap.p if gap else None,
        }
    pairs = {
        name: [(own.scores[task], reference.scores[task]) for task in members]
        for name, members in own.members.items()
    }
    gaps = {name: own.values[name] - reference.values[name] for name in own.values}
    return {
        "tasks": tasks,
        "values": own.values,
        "differences": {name: _difference(gaps[name], [pairs[name]]) for name in gaps},
        "average": own.average,
        "average_difference": _difference(own.average - reference.average, list(pairs.values())),
        "retention": own.average / reference.average if reference.average else 0.0,
    }


Pairs = list[tuple[list[float] | None, list[float] | None]]
"""For each task, the per-document scores of the model and of the dense model; None if the metric
is not a mean over documents."""


def _difference(value: float, groups: list[Pairs]) -> Difference:
    """A difference with its paired bootstrap interval, if every task has per-document scores."""
    paired = [[(own, its) for own, its in group if own and its] for group in groups]
    if [len(group) for group in paired] != [len(group) for group in groups]:
        return {"value": value, "low": None, "high": None}
    low, high = mean_difference(paired)
    return {"value": value, "low": low, "high": high}


def _log_depth(trackers: Trackers, result: DepthResult) -> None:
    metrics: dict[str, Any] = {
        "eval/layers": result["layers"],
        "eval/stage": result["stage"],
        "eval/parameters": result["parameters"],
        "eval/sparsity": result["sparsity"],
    }
    if result["perplexity"]:
        metrics |= {
            f"eval/perplexity_{k}": v for k, v in result["perplexity"].items() if k != "nll"
        }
    for name, found in result["also"].items():
        metrics |= {f"eval/{name}_perplexity_{k}": v for k, v in found.items() if k != "nll"}
    if result["speed"]:
        metrics |= {f"eval/speed_{k}": v for k, v in result["speed"].items() if "spread" not in k}
    if result["zero_shot"]:
        metrics |= {
            "eval/average": result["zero_shot"]["average"],
            "eval/retention": result["zero_shot"]["retention"],
        }
        metrics |= {f"eval/{name}": value for name, value in result["zero_shot"]["values"].items()}
        metrics |= {
            f"eval/{task}_{key}": value
            for task, values in result["zero_shot"]["tasks"].items()
            for key, value in values.items()
            if isinstance(value, int | float)
        }
    trackers.log(metrics)
