"""Estimates time, memory and disk of a compression before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise

import torch

from come.merge.constraints import depths
from come.merge.joint_selection import joint_lambda
from come.merge.method import Method
from come.merge.width import kept_units
from come.merge.work import SpanSize, Work
from come.models.shape import ModelShape
from come.models.width import CHANNEL
from come.report.numbers import duration, megabytes

EFFICIENCY = {"cpu": 0.8, "cuda": 0.45}
"""Assumed speed of a compression relative to plain matrix products (experiments/LOG.md)."""


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second of a device.

    Attributes:
        forward: in the model's dtype.
        single: in float32.
        double: in float64.
    """

    forward: float
    single: float
    double: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Speed:
        """The measured speed of matrix products, times `EFFICIENCY`."""
        share = EFFICIENCY[device.type]
        single, double = (_products(device, kind) for kind in (torch.float32, torch.float64))
        forward = single if dtype == torch.float32 else _products(device, dtype)
        return cls(share * forward, share * single, share * double)

    def seconds(self, work: Work) -> float:
        """Seconds that the work takes."""
        slower = work.single / self.single + work.double / self.double
        return work.forward / self.forward + slower


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product: the best of at least four, in half a second.

    The best of fewer products would depend too much on the current load of a shared machine.
    """
    size = 768 if device.type == "cpu" else 4096
    factor = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    end = time.perf_counter() + 0.5
    while len(times) < 4 or time.perf_counter() < end:
        began = time.perf_counter()
        torch.nn.functional.linear(factor, factor)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a compression.

    Attributes:
        tokens: number of calibration tokens.
        work: arithmetic of all merges and trial merges.
        trials: sizes of the spans that are merged on trial.
        weight_bytes: bytes of the weights that stay in memory: all, or all but those of layers on
            disk.
        boundary_bytes: bytes of the hidden states stored at the layer boundaries.
        store: where the hidden states are stored, "memory" or "disk".
        device: the model's device type, "cpu" or "cuda".
        extra: settings that need additional passes (gradients, searches), which `work` does not
            include.
        weights: where the decoder layers are, "memory" or "disk".
        batch_bytes: bytes of one layer's activations for a batch of windows.
        validation_bytes: bytes of the hidden states of the validation windows of trial merges.
        trial_bytes: bytes of the layers of trial merges, if sets of them are compared; on disk.
        layer_bytes: bytes of the layers on disk that are in memory during a forward pass.
    """

    tokens: int
    work: Work
    trials: list[int]
    weight_bytes: int
    boundary_bytes: int
    store: str
    device: str = "cpu"
    extra: list[str] = field(default_factory=list)
    weights: str = "memory"
    batch_bytes: int = 0
    validation_bytes: int = 0
    trial_bytes: int = 0
    layer_bytes: int = 0

    def lines(self, speed: Speed) -> list[str]:
        """Lines to log before the compression starts."""
        more = f", and more for {', '.join(self.extra)}" if self.extra else ""
        tried = f", {len(self.trials)} trial merges" if self.trials else ""
        lines = [
            f"cost: {self.tokens} calibration tokens{tried}",
            f"time: about {duration(speed.seconds(self.work))} for the merge{more}",
        ]
        solving = f"{megabytes(self.step_bytes)} for a merge"
        own = f"weights {megabytes(self.weight_bytes)}"
        if self.weights == "disk":
            own += " in addition to the layers on disk"
        parts = [own, solving]
        if self.store == "disk":
            files = f"{megabytes(self.boundary_bytes)} in memory-mapped files"
            parts.append(f"hidden states {megabytes(self.validation_bytes)}, and {files}")
            return [*lines, f"memory: {', '.join(parts)}"]
        states = f"hidden states {megabytes(self.boundary_bytes + self.validation_bytes)}"
        if self.device == "cuda":
            return [*lines, f"memory: {', '.join(parts)} on the GPU; {states} in main memory"]
        return [*lines, f"memory: {', '.join([*parts, states])}"]

    @property
    def memory_bytes(self) -> float:
        """Bytes of weights, one step of the merge, and hidden states that are not on disk."""
        return self.weight_bytes + self.step_bytes + self.states_bytes + self.validation_bytes

    @property
    def step_bytes(self) -> float:
        """Bytes of the largest least-squares problem or of loaded layers, and of activations."""
        return max(self.work.bytes, float(self.layer_bytes)) + self.batch_bytes

    @property
    def states_bytes(self) -> int:
        """Bytes of the hidden states at boundaries, unless they are on disk."""
        return self.boundary_bytes if self.store == "memory" else 0


def compression_cost(
    shape: ModelShape,
    *,
    num_samples: int,
    seq_len: int,
    target: int,
    method: Method,
    store: str,
    device: str = "cpu",
    weights: str = "memory",
    batch_size: int = 4,
) -> Cost:
    """Estimates the cost of merging a model of `shape` down to `target` layers."""
    layers, tokens = shape.num_layers, num_samples * seq_len
    metric, selection, schedule = method.sensitivity, method.selection, method.schedule
    trials = _trial_spans(method, layers, target)
    fitted, validation = selection.trial_tokens(num_samples, seq_len)
    work = merge_work(shape, method, target, tokens)
    work += trial_work(shape, method, target, fitted, validation)
    _, heads = _set_passes(method, layers, target)
    extra = {
        f"merge.selection={selection.name}": not (selection.local or selection.num_trials or heads),
        f"merge.sensitivity={metric.name}": bool(metric.gradient),
        f"merge.retention={method.retention.name}": method.retention.trials,
        f"merge.schedule={schedule.name}": schedule.trials,
        f"merge.refit={method.refit.name}": method.refit.active
        and method.refit.work(_span(shape, 2, tokens)) == Work(),
        f"merge.refit.downstream={method.refit.downstream}": method.refit.downstream is not None,
    }
    layer = shape.block_parameters["layer"] * shape.dtype.itemsize
    slots = layers + 1 if method.block == "layer" else 2 * layers + 1
    if metric.gradient == "path":
        slots += layers + 1  # the boundaries of a second stream
    if method.needs_dense:
        slots += (layers + 1) // 2  # the dense model's, where a merge has changed them
    return Cost(
        tokens=tokens,
        work=work,
        trials=trials,
        trial_bytes=len(trials) * layer if schedule.sets_compared else 0,
        weight_bytes=shape.weight_bytes - (0 if weights == "memory" else layers * layer),
        layer_bytes=0 if weights == "memory" else 2 * layer,  # the second one is read ahead
        validation_bytes=validation * shape.hidden * shape.dtype.itemsize * (layers + 1)
        if trials
        else 0,
        batch_bytes=batch_size * seq_len * (3 * shape.channels + 6 * shape.hidden) * 4,
        boundary_bytes=tokens * shape.hidden * shape.dtype.itemsize * slots,
        store=store,
        device=device,
        extra=[name for name, costs in extra.items() if costs],
        weights=weights,
    )


def merge_work(shape: ModelShape, method: Method, target: int, tokens: int) -> Work:
    """The work of all merges and of narrower layers, without trial merges."""
    layers, ratio = shape.num_layers, joint_lambda(method.refit)
    merges = _merged_spans(method, layers, target)
    sweeps = len(merges) if method.schedule.remeasures else 0  # over the layers after a merge
    if method.measures_ahead:
        sweeps = min(sweeps, 1)  # each merge continues where the previous one ended
    work = _span(shape, 1, tokens).passes * (layers + sweeps * layers / 2)
    for size in merges:
        span = _span(shape, size, tokens, ratio)
        work += method.retention.work(span) + method.refit.work(span)
    units = kept_units(method, shape.config, shape.layouts)
    if units:  # every layer of the merged model, from the first to the last
        span = replace(_span(shape, 1, tokens, ratio), kept=units.get(CHANNEL))
        steps = span.passes + method.retention.work(span) + method.refit.work(span)
        work += steps * target
    through, heads = _set_passes(method, layers, target)
    work += _span(shape, 1, tokens).passes * through
    return work + Work(forward=2.0 * tokens * shape.vocabulary * shape.hidden) * heads


def _set_passes(method: Method, layers: int, target: int) -> tuple[int, int]:
    """Passes through layers and the head for which a schedule chooses a set of layers."""
    return (0, 0) if target == layers else method.schedule.passes(layers, target)


def trial_work(
    shape: ModelShape, method: Method, target: int, fitted: int, validation: int
) -> Work:
    """The work of all trial merges.

    Args:
        shape: the dense model.
        method: the merging method.
        target: number of layers to reach.
        fitted: tokens that a trial is fitted to.
        validation: tokens that score it.
    """
    work = Work()
    for size in _trial_spans(method, shape.num_layers, target):
        span = _span(shape, size, fitted, joint_lambda(method.refit))
        work += method.retention.work(span)
        work += method.refit.trial_work(span, method.retention.solves)
        work += _judged(shape, validation)
    if _merged_spans(method, shape.num_layers, target)[1:]:  # several spans
        work += _judged(shape, validation) * method.schedule.sets_compared
    return work


def _judged(shape: ModelShape, tokens: int) -> Work:
    """The work of comparing a merged model's predictions with the dense model's."""
    head = Work(forward=2.0 * tokens * shape.vocabulary * shape.hidden)
    return _span(shape, 1, tokens).passes * (shape.num_layers / 2) + head


def _span(shape: ModelShape, layers: int, tokens: int, ratio: float = 0.1) -> SpanSize:
    return SpanSize(
        layers=layers,
        tokens=tokens,
        hidden=shape.hidden,
        heads=shape.heads,
        channels=shape.channels,
        parameters=shape.block_parameters["layer"],
        input_maps=shape.input_maps,
        ratio=ratio,
    )


def _merged_spans(method: Method, layers: int, target: int) -> list[int]:
    """Sizes of the merged spans, if all are as large as allowed."""
    if method.groups:
        return [len(span) for span in method.groups]
    passed = [layers, *depths(layers, target, method.constraints(layers, target).m)]
    return [above - below + 1 for above, below in pairwise(passed)]


def _trial_spans(method: Method, layers: int, target: int) -> list[int]:
    """Sizes of the spans merged on trial: a shortlist per merge, or the schedule's own count."""
    count = method.selection.num_trials
    if not count or method.groups or target == layers:
        return []
    if not method.schedule.variable_size:
        return _merged_spans(method, layers, target) * count
    pairs = min(layers - 1, max(count, 2 * (layers - target)))
    larger = list(range(3, min(method.m, layers - target + 1) + 1))
    return [2] * pairs + list(islice(cycle(larger), layers - target if larger else 0))
