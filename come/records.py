"""The schema of `result.json`."""

from __future__ import annotations

from typing import Any, TypedDict


class PerplexityResult(TypedDict):
    """Perplexity of one model on one held-out text.

    value, low, high: perplexity and its 95% confidence interval over windows.
    ratio, ratio_low, ratio_high: ratio to the dense model's perplexity, paired by window, with its
        95% confidence interval (1 for the dense model).
    tokens, windows: size of the text.
    nll: mean negative log-likelihood of every window, in nats per token.
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
    """Speed and memory of one model, timed alternately with the dense model.

    prompt, generation: tokens/s of the median repetition.
    prompt_spread, generation_spread: [slowest, fastest] repetition, tokens/s.
    prompt_ratio, generation_ratio: tokens/s divided by the dense model's.
    prompt_realised, generation_realised: share of the time saved, divided by the share of the
        layers' parameters removed: 1 if time falls in proportion to depth, 0 for the dense model.
    peak_bytes: weights, plus peak memory above them during the timed work.
    cache_bytes: size of the KV cache of the prompt.
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
    """One zero-shot task: its metric with standard error, and the paired difference to dense.

    documents: number of documents.
    metric: name of the headline metric: acc if the task has it, otherwise its first metric.
    value, stderr: headline metric and its standard error, as the harness reports them; stderr is
        None if the harness reports none.
    metrics: all metrics and standard errors of the task by name, such as acc_norm.
    scores: headline metric of every document, in order; None if the metric is not a mean over
        documents (a correlation, F1, BLEU).
    difference, difference_low, difference_high: value minus the dense model's value on the same
        documents, with its 95% confidence interval (paired bootstrap); the interval is None if
        `scores` is None.
    mcnemar_p: p-value of McNemar's exact test of that difference; None if `scores` is None.
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
    """A value minus the dense model's, with its 95% interval (paired bootstrap over documents).

    The interval is None if a task has no per-document scores.
    """

    value: float
    low: float | None
    high: float | None


class ZeroShotResult(TypedDict):
    """Zero-shot accuracy.

    tasks: results by task name, including every task of a requested group.
    values: value of every requested task (its headline metric) or group (its aggregate).
    differences: difference of each value to the dense model's; the interval of a group weights all
        its documents equally.
    average: mean of `values`.
    average_difference: difference of `average` to the dense model's.
    retention: average divided by the dense model's; 0 if that is 0.
    """

    tasks: dict[str, TaskResult]
    values: dict[str, float]
    differences: dict[str, Difference]
    average: float
    average_difference: Difference
    retention: float


class DepthResult(TypedDict):
    """The results of one model of a job; the dense model comes first.

    layers, parameters: size of the model; tied parameters are counted once. If one sublayer is
        merged (`merge.sublayers`), `layers` is the number of layers that keep that sublayer, and
        `parameters` excludes the zeroed sublayers.
    sparsity: share of the dense model's parameters that is removed.
    stage: dense, merged or distilled.
    folder: model folder, relative to the job folder; "" for the dense model.
    perplexity, speed, zero_shot: None if not measured.
    also: perplexity on the texts of `eval.extra_texts`, by name.
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
    """Time and memory of the merge.

    seconds: time from the loaded model to the merged model, summed over the sessions of a resumed
        job.
    peak_bytes: peak memory above the level before the model was loaded (resident set on the CPU,
        allocator peak on CUDA), in the last session.
    weight_bytes: bytes of the dense model's weights.
    boundary_bytes: estimated bytes of the hidden states stored at all layer boundaries.
    layer_passes: number of times that all windows pass through one layer, trial merges included;
        0 if a plan was applied or an already merged model was loaded.
    resumed_at: number of merges that an earlier session, or the run given by `from_run`, had
        already done; 0 if there is none.
    """

    seconds: float
    peak_bytes: int
    weight_bytes: int
    boundary_bytes: int
    layer_passes: float
    resumed_at: int


class CalibrationResult(TypedDict):
    """The calibration text.

    source: description of the text.
    corpus_tokens: tokens of the text that the windows were cut from.
    tokens, windows: number of calibration tokens and windows.
    removed_lines: lines left out because the held-out text contains them too.
    hash: hash of the windows.
    """

    source: str
    corpus_tokens: int
    tokens: int
    windows: int
    removed_lines: int
    hash: str


class DistillationResult(TypedDict):
    """The distillation after the merge.

    Layer-wise training (`apart`) trains every merged layer separately.

    method, source: registry name of the method, and description of the training text.
    tokens: training tokens, with repetitions.
    distinct_tokens: training tokens, without repetitions.
    validation_tokens: tokens held out of the training text.
    steps, best_step: number of optimiser steps, and the step with the best validation loss, whose
        weights are kept. Layer-wise: the largest of all layers.
    processes: number of processes started by `accelerate launch`.
    trained_parameters: number of trained parameters. Layer-wise: of one layer.
    weight_bytes, gradient_bytes, optimizer_bytes: training memory, without activations.
        Layer-wise: of one layer.
    seconds, tokens_per_second: time and throughput of the training steps, without validation.
        Layer-wise: the time is summed over the layers.
    curve: [tokens, loss] at every step. Layer-wise: the loss is summed over the layers.
    validation: at every validation, the tokens so far, "loss", its components, and, if the whole
        model runs, "nll", the cross-entropy of the student. Layer-wise: the summed "loss" only.
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
    """The content of `result.json`: all results of a job.

    job: hash of the job.
    model, method: labels.
    changes: settings of the method that the command line overrides, such as "refit=ridge".
    plan: hash of the plan of the last model.
    merge_history: original layers merged into each layer of the last model.
    depths: the dense model and every compressed model, deepest first; a distilled model follows
        the merged model that it was trained from.
    calibration: calibration text of the merge. If a plan was applied, the text that the plan was
        computed on; None if it is unknown.
    distillation: None if the job has none.
    eval_source, eval_also: description of the held-out text, and of those of `eval.extra_texts`
        by name.
    settings: the resolved settings.
    versions: versions of Python, of this package and of the packages that affect the numbers.
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
