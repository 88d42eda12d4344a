"""The schema of `result.json`."""

from __future__ import annotations

from typing import Any, TypedDict


class DepthResult(TypedDict):
    """The results of one model of a job; the dense model comes first.

    layers, parameters: size of the model; tied parameters are counted once. If one sublayer is
        merged (`merge.sublayers`), `layers` is the number of layers that keep that sublayer, and
        `parameters` excludes the zeroed sublayers. If sublayers are dropped one by one
        (merge=subfit), `layers` is the depth of the same cost, and `parameters` are those used.
    sparsity: share of the dense model's parameters that is removed.
    stage: dense, merged or distilled.
    folder: model folder, relative to the job folder; "" for the dense model.
    metrics: records of `come.evaluate.base.Metric` by name.
    """

    layers: int
    parameters: int
    sparsity: float
    stage: str
    folder: str
    metrics: dict[str, dict[str, Any]]


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


class ShapeResult(TypedDict):
    """The search of a depth and width for `merge.budget`.

    job: hash of the job.
    quantity, budget: what is limited, "parameters" or "latency", and its largest share.
    seconds: time of the search, of its last session.
    candidates: fields of every `come.merge.budget.CandidateShape`, deepest first.
    chosen: index of the chosen one; None in the file of an unfinished search.
    """

    job: str
    quantity: str
    budget: float
    seconds: float
    candidates: list[dict[str, Any]]
    chosen: int | None


class CalibrationResult(TypedDict):
    """The calibration text.

    source: description of the text.
    corpus_tokens: tokens of the text that the windows were cut from.
    tokens, windows: number of calibration tokens and windows.
    removed_lines: lines left out because the held-out text contains them too.
    drawn_from: for each text, named by its content, the share of it, from its beginning, that the
        windows were drawn from.
    hash: hash of the windows.
    """

    source: str
    corpus_tokens: int
    tokens: int
    windows: int
    removed_lines: int
    drawn_from: dict[str, float]
    hash: str


class DistillationResult(TypedDict):
    """The distillation after the merge.

    Layer-wise training trains every merged layer separately.

    method, source: registry name of the method, and description of the training text.
    drawn_from: as for calibration; nothing for text that models write.
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
    drawn_from: dict[str, float]
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
    shape: how depth and width were chosen; None without `merge.budget`.
    calibration: calibration text of the merge. If a plan was applied, the text that the plan was
        computed on; None if it is unknown.
    distillation: None if the job has none.
    settings: the resolved settings.
    versions: versions of Python, of this package and of the packages that affect the numbers;
        "code" is a hash of this package's code, and "commit", in a git clone, its commit.
    machine: description of the machine, and the dtype of the computation.
    command: the command line; "" from Python.
    """

    job: str
    model: str
    method: str
    changes: list[str]
    plan: str
    merge_history: list[list[int]]
    depths: list[DepthResult]
    shape: ShapeResult | None
    compression: CompressionResult
    calibration: CalibrationResult | None
    distillation: DistillationResult | None
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    command: str
