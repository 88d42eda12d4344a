"""The schema of `result.json`."""

from __future__ import annotations

from typing import Any, TypedDict


class PerplexityResult(TypedDict):
    """Perplexity of one model on the held-out text.

    value, low, high: perplexity and its 95% interval over windows.
    ratio, ratio_low, ratio_high: over the dense model's, paired by window (1 for itself).
    tokens, windows: how much text.
    nll: mean negative log-likelihood of every window, nats a token.
    """

    value: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens: int
    windows: int
    nll: list[float]


class SpeedResult(TypedDict):
    """Speed and memory of one model, the dense one and it in turn.

    prompt, generation: tokens/s of the median repetition.
    prompt_spread, generation_spread: [slowest, fastest], tokens/s.
    prompt_ratio, generation_ratio: tokens/s over the dense model's.
    prompt_realised, generation_realised: share of the time saved over the share of layers removed;
        1 where time falls as depth does, 0 for the dense model.
    peak_bytes: its weights, and the most memory above them while it worked.
    cache_bytes: keys and values of the prompt.
    """

    prompt: float
    prompt_spread: list[float]
    prompt_ratio: float
    prompt_realised: float
    generation: float
    generation_spread: list[float]
    generation_ratio: float
    generation_realised: float
    peak_bytes: int
    cache_bytes: int


class TaskResult(TypedDict):
    """One task: its metric with standard error, and the paired difference to the dense model.

    documents: how many.
    metric: the one that counts, acc where the task has it.
    value, stderr: of that metric, as the harness gives them; no stderr where it gives none.
    metrics: all metrics and standard errors of the task by name, such as acc_norm.
    scores: the metric of every document, in their order; None where it is no mean over documents
        (a correlation, F1, BLEU).
    difference, difference_low, difference_high: value minus the dense model's on the same
        documents, with its 95% interval (paired bootstrap); no interval without scores.
    mcnemar_p: exact test of that difference; None without scores.
    """

    documents: int
    metric: str
    value: float
    stderr: float | None
    metrics: dict[str, float]
    scores: list[float] | None
    difference: float
    difference_low: float | None
    difference_high: float | None
    mcnemar_p: float | None


class Difference(TypedDict):
    """A value minus the dense model's, and its 95% interval (paired bootstrap over documents).

    The interval is None where a task has no score for each document.
    """

    value: float
    low: float | None
    high: float | None


class ZeroShotResult(TypedDict):
    """Zero-shot accuracy.

    tasks: by name; of a group all of its tasks.
    values: what was asked for: a task's metric, a group's aggregate.
    differences: of each value; in the interval of a group all its documents count the same.
    average: mean of the values.
    average_difference: of the average.
    retention: average over the dense model's; 0 where that is 0.
    """

    tasks: dict[str, TaskResult]
    values: dict[str, float]
    differences: dict[str, Difference]
    average: float
    average_difference: Difference
    retention: float


class DepthResult(TypedDict):
    """One model of a run; the dense one comes first.

    layers, parameters: its size, tied parameters once; of a job with merge.parts, how many layers
        still have that part, and the parameters without those of silent blocks.
    sparsity: share of the dense model's parameters that is gone.
    stage: dense, merged or distilled.
    folder: where it is saved, relative to the run's folder; "" for the dense model.
    perplexity, speed, zero_shot: None where they were not measured.
    also: perplexity on the further texts of eval.extra_texts, by their names.
    continuations: greedy continuations of the report's prompts.
    """

    layers: int
    parameters: int
    sparsity: float
    stage: str
    folder: str
    perplexity: PerplexityResult | None
    also: dict[str, PerplexityResult]
    speed: SpeedResult | None
    zero_shot: ZeroShotResult | None
    continuations: list[str]


class CompressionResult(TypedDict):
    """What the merge cost.

    seconds: from the loaded model to the merged one, over all sessions of a resumed job.
    peak_bytes: peak resident memory above the level before the model was loaded, last session.
    weight_bytes: bytes of the dense model's weights.
    boundary_bytes: bytes of all boundary states.
    layer_passes: passes of all windows over one layer, trials included; 0 where a plan was applied.
    resumed_at: merges that an earlier session had finished; 0 without interruption.
    """

    seconds: float
    peak_bytes: int
    weight_bytes: int
    boundary_bytes: int
    layer_passes: float
    resumed_at: int


class CalibrationResult(TypedDict):
    """The calibration text: where from, tokens in hand and tokens used, the windows' hash."""

    source: str
    corpus_tokens: int
    tokens: int
    windows: int
    removed_lines: int
    hash: str


class DistillationResult(TypedDict):
    """What the training after the merge did.

    method, source: registry name, and what the training text is.
    tokens: tokens trained on, repeated ones counted again; distinct_tokens: without those.
    validation_tokens: held out of the training text.
    steps, best_step: optimiser steps, and the one whose weights were kept, by validation.
    processes: that trained side by side.
    trained_parameters: how many parameters trained; apart, of one layer.
    weight_bytes, gradient_bytes, optimizer_bytes: held while training, besides activations; apart,
        of one layer's job.
    seconds, tokens_per_second: of the training steps, validations not counted; apart, of all layers
        one after another.
    curve: [tokens, loss] of every step.
    validation: of every validation its tokens, "loss", parts of it, and "nll", the student's
        cross-entropy, where the whole model runs.
    """

    method: str
    source: str
    tokens: int
    distinct_tokens: int
    validation_tokens: int
    steps: int
    best_step: int
    processes: int
    trained_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    seconds: float
    tokens_per_second: float
    curve: list[list[float]]
    validation: list[dict[str, float]]


class Result(TypedDict):
    """Everything that a job found.

    job: the job's hash.
    model, method: labels.
    changes: settings of the method that the command changed, such as "refit=ridge".
    merge_history: original layers behind every layer of the last model.
    depths: the dense model and every merged one, deepest first.
    calibration: the merge's, of a given plan what it was made with; None if that is not known.
    distillation: None without.
    eval_source: what the held-out text is; eval_also: and the further ones, by name.
    settings: the resolved settings.
    versions: of Python and the packages that matter.
    """

    job: str
    model: str
    method: str
    changes: list[str]
    plan: str
    merge_history: list[list[int]]
    depths: list[DepthResult]
    compression: CompressionResult
    calibration: CalibrationResult | None
    distillation: DistillationResult | None
    eval_source: str
    eval_also: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
