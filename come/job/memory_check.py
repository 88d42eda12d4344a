"""Checks before a merge that it fits into memory, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psutil
import torch

from come.data.sampling import BATCH as SAMPLED_TOGETHER
from come.job.estimate import Cost
from come.job.job import merge_cost
from come.models.loading import ModelShape, choose_device, choose_weights
from come.report.numbers import megabytes
from come.schema import Settings

FEWER_TOKENS = (8192, 4096, 2048, 1024)


def memory_shortage(
    settings: Settings, shape: ModelShape, target: int, processes: int = 1
) -> str | None:
    """What does not fit, and the settings with which it would; None if the compression fits.

    `processes`: number of processes on this machine, each with its own weights.
    """
    missing = _missing(settings, merge_cost(settings, shape, target), processes)
    if missing is None:
        return None
    words: list[str] = []
    for word, changed in _changes(settings):
        words = [*(w for w in words if w.partition("=")[0] != word.partition("=")[0]), word]
        settings = changed
        if _missing(settings, merge_cost(settings, shape, target), processes) is None:
            return f"{missing}; it would fit with {' '.join(words)}"
    return (
        f"{missing}; take a machine with more, or fewer calibration.num_samples and a smaller "
        "merge.m"
    )


def sampling_cost(settings: Settings, shape: ModelShape) -> str | None:
    """What sampling the calibration text reads from disk; None if the layers are in memory."""
    calibration, device = settings.calibration, choose_device(settings.model.device)
    windows = calibration.num_continuations
    begin = calibration.prefix_tokens
    if calibration.self_generated:
        windows, begin = round(calibration.num_samples / calibration.keep_likeliest), 2
    if not windows or choose_weights(settings.weights, shape, device) == "memory":
        return None
    sweeps = -(-windows // SAMPLED_TOGETHER) * (calibration.seq_len - begin)
    read = sweeps * shape.num_layers * shape.block_parameters["layer"] * shape.dtype.itemsize
    return (
        f"sampling text reads all layers {sweeps} times, {megabytes(read)} in all; "
        "calibration.path=FILE needs no sampling"
    )


def _missing(settings: Settings, cost: Cost, processes: int) -> str | None:
    device = choose_device(settings.model.device)
    main = psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        for needed, there, name in (
            (cost.weight_bytes + cost.work.bytes, free, "device memory"),
            (0 if processes > 1 else cost.states_bytes, main, "main memory"),
        ):
            if needed > there:
                return _short(needed, there, name)
        return None
    needed = cost.memory_bytes
    if processes > 1:  # boundary states are in files
        needed = processes * (cost.weight_bytes + cost.work.bytes)
    return _short(needed, main, "memory") if needed > main else None


def _short(needed: float | int, there: int, name: str) -> str:
    return f"the merge needs {megabytes(needed)} of {name}, and {megabytes(there)} are free"


def _changes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Settings that need less and less memory, each on top of the one before, as overrides."""
    if settings.model.weights != "disk" and not settings.distill.active:
        settings = replace(settings, model=replace(settings.model, weights="disk"))
        yield "model.weights=disk", settings
    if settings.calibration.store != "disk":
        settings = replace(settings, calibration=replace(settings.calibration, store="disk"))
        yield "calibration.store=disk", settings
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
