"""The memory budget of a merge: what is kept in memory or on disk, and whether all of it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import psutil
import torch

from come.data.sampling import BATCH as SAMPLED_TOGETHER
from come.job.estimate import Cost
from come.job.job import merge_cost
from come.job.processes import process_count
from come.models.loading import choose_device, choose_weights
from come.models.shape import ModelShape
from come.report.numbers import megabytes
from come.schema import Settings
from come.schema.calibration import WINDOWS

SHARE = 0.9  # share of the free memory that a merge may use
FEWER_TOKENS = (8192, 4096, 2048, 1024)
PLACEMENTS = ("memory", "disk")
BATCHES = (WINDOWS, WINDOWS // 2, 1)


@dataclass(frozen=True)
class Need:
    """The memory of one kind that a merge needs, and its budget, in bytes."""

    kind: str
    needed: int | float
    budget: int | float
    limited: bool = False
    """Whether `calibration.memory` sets the budget, rather than the free memory."""

    def describe(self) -> str:
        """Both numbers in words."""
        return f"{megabytes(self.needed)} of {self.kind}, and may use {megabytes(self.budget)}"


def choose_placement(settings: Settings, shape: ModelShape, target: int) -> Settings:
    """The settings with "auto" replaced: the batch size, and memory or disk for each store.

    If a merge does not fit, the batch size is reduced first, then hidden states go to disk, then
    weights. Weights that need more than 2/3 of the free memory are always on disk
    (`choose_weights`). These choices change the result by rounding at most: a refit that depends on
    the batch size gets the largest. Several processes share the hidden states in files.
    """
    weights: tuple[str, ...] = (settings.weights,)
    stores: tuple[str, ...] = (settings.calibration.store,)
    if settings.weights == "auto":
        most = choose_weights("auto", shape, choose_device(settings.model.device))
        weights = ("memory",) if shape.routed else PLACEMENTS[PLACEMENTS.index(most) :]
    if settings.calibration.store == "auto":
        stores = PLACEMENTS if process_count() == 1 else ("disk",)
    batches: tuple[int, ...] = (settings.calibration.batch,)
    if settings.calibration.batch_size == "auto" and not settings.merge.refit.batchwise:
        batches = BATCHES
    chosen = settings
    for place, store, batch in product(weights, stores, batches):
        chosen = _with(settings, place, store, batch)
        if not missing(chosen, shape, target):
            break
    return chosen


def missing(settings: Settings, shape: ModelShape, target: int) -> list[Need]:
    """The kinds of memory of which the merge needs more than it may use."""
    needs = memory_needs(settings, merge_cost(settings, shape, target))
    return [need for need in needs if need.needed > need.budget]


def memory_needs(settings: Settings, cost: Cost) -> list[Need]:
    """The need and budget of each kind of memory; every process has its own weights.

    The budget is `calibration.memory`, which limits the GPU's memory if there is a GPU, and at most
    9/10 of the free memory.
    """
    device, processes = choose_device(settings.model.device), process_count()
    main = SHARE * psutil.virtual_memory().available
    given = settings.calibration.memory_bytes or math.inf
    own, validation = cost.weight_bytes + cost.step_bytes, processes * cost.validation_bytes
    if device.type != "cuda":
        needed = processes * own + validation + cost.states_bytes
        return [Need("memory", needed, min(given, main), given < main)]
    free = SHARE * torch.cuda.mem_get_info(device)[0]
    return [
        Need("device memory", own, min(given, free), given < free),
        Need("main memory", validation + cost.states_bytes, main),
    ]


def budget_line(settings: Settings, cost: Cost) -> str:
    """Describes the need and budget of each kind of memory."""
    return "budget: needs " + "; ".join(need.describe() for need in memory_needs(settings, cost))


def memory_shortage(settings: Settings, shape: ModelShape, target: int) -> str | None:
    """What does not fit, and the settings with which it would fit; None if the merge fits."""
    short = missing(settings, shape, target)
    if not short:
        return None
    said = f"the merge needs {short[0].describe()}"
    words: list[str] = []
    for word, changed in _changes(settings):
        words = [*(w for w in words if w.partition("=")[0] != word.partition("=")[0]), word]
        settings = changed
        if not missing(settings, shape, target):
            return f"{said}; it would fit with {' '.join(words)}"
    more = "take a machine with more"
    if missing(settings, shape, target)[0].limited:
        more = f"raise calibration.memory={settings.calibration.memory}"
    if process_count() > 1:
        more += ", start fewer processes"
    return f"{said}; {more}, or take fewer calibration.num_samples and a smaller merge.m"


def sampling_cost(settings: Settings, shape: ModelShape) -> str | None:
    """Describes the disk reads of sampling calibration text; None if layers are in memory."""
    calibration, device = settings.calibration, choose_device(settings.model.device)
    windows = calibration.num_continuations
    begin = calibration.prefix_tokens
    if calibration.sampled_windows:
        windows, begin = round(calibration.sampled_windows / calibration.keep_likeliest), 2
    if not windows or choose_weights(settings.weights, shape, device) == "memory":
        return None
    sweeps = -(-windows // SAMPLED_TOGETHER) * (calibration.seq_len - begin)
    read = sweeps * shape.num_layers * shape.block_parameters["layer"] * shape.dtype.itemsize
    return (
        f"sampling text reads all layers {sweeps} times, {megabytes(read)} in all; "
        "calibration.path=FILE needs no sampling"
    )


def _with(settings: Settings, weights: str, store: str, batch: int) -> Settings:
    calibration = replace(settings.calibration, store=store, batch_size=batch)
    if settings.weights == "auto":
        settings = replace(settings, model=replace(settings.model, weights=weights))
    return replace(settings, calibration=calibration)


def _changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Overrides that reduce memory, each with the settings after it and all earlier ones."""
    if settings.weights == "memory" and not settings.distill.active:
        settings = replace(settings, model=replace(settings.model, weights="disk"))
        yield "model.weights=disk", settings
    if settings.calibration.store != "disk":
        settings = _with(settings, settings.weights, "disk", settings.calibration.batch)
        yield "calibration.store=disk", settings
    if settings.calibration.batch > 1:
        settings = replace(settings, calibration=replace(settings.calibration, batch_size=1))
        yield "calibration.batch_size=1", settings
    merge = settings.merge
    if "tokens" in type(merge.retention).settings():
        read = settings.calibration.tokens
        most = min(getattr(merge.retention, "tokens", None) or read, read)
        for tokens in FEWER_TOKENS:
            if tokens < most:
                fewer = replace(merge.retention, **{"tokens": tokens})
                yield (
                    f"merge.retention.tokens={tokens}",
                    replace(settings, merge=replace(merge, retention=fewer)),
                )
