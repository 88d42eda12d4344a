"""The search of a depth and an FFN width for `merge.budget`, before the merge."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from come.evaluate.divergence import DenseReference
from come.files import read_again, read_object, write_text
from come.job.estimate import Speed, merge_work, trial_work
from come.job.folder import SHAPE
from come.job.job import Job
from come.job.latency import measure_latency
from come.job.sampled_text import with_samples
from come.job.stages.depth import searched_channels, shapes_within_budget
from come.memory import trim_heap
from come.merge.budget import CandidateShape, validation_windows
from come.merge.golden_section import MOST_EVALUATIONS, find_minimum, lowest
from come.merge.loop import compress
from come.merge.trial_scores import TrialScores
from come.merge.work import Work
from come.models.weights import remove_changed_layers
from come.records import ShapeResult
from come.report.numbers import duration
from come.schema.merge import MergeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def choose_shape(job: Job) -> Job:
    """The job with the depth and FFN width that change predictions least within the budget.

    Every candidate is the widest FFN at one depth. A golden-section search over the depths merges
    up to six of them on trial: with few windows and the surrogate of the refit. It takes the one
    with the smallest mean KL(dense || merged) per token on other calibration windows. Without
    `merge.budget` the job is returned as it is.

    The search is written to a file in the job folder after every trial, and a resumed job continues
    it.

    Raises:
        ValueError: no shape is within a budget of time, or predictions are not finite.
    """
    if not job.shapes:
        return job
    search = _earlier(job)
    if search is None or search["chosen"] is None:
        search = _search(job, search)
    shapes, chosen = _shapes(search), search["chosen"]
    assert chosen is not None
    for index, own in enumerate(shapes):
        log.info(
            "shape: %s, %.3f of the dense %s%s%s",
            own,
            own.share,
            search["quantity"],
            "" if own.kl is None else f", KL {own.kl:.4f} nats/token",
            " (chosen)" if index == chosen else "",
        )
    return replace(job.with_shape(shapes[chosen]), shape_search=search)


def search_lines(job: Job, speed: Speed, *, estimated: bool = False) -> list[str]:
    """Lines to log before a search: its candidates and its cost; none without `merge.budget`.

    Args:
        job: the job.
        speed: of the device.
        estimated: whether times follow from the number of parameters, before they are measured.
    """
    if not job.shapes:
        return []
    limit, shapes = str(job.settings.merge.budget), job.shapes
    if estimated and job.settings.merge.budget.latency is not None:
        limit += ", in proportion to the parameters of layers (a run measures their time)"
    if len(shapes) == 1:
        return [f"shape: {shapes[0]}, the only one for {limit}"]
    fitted, held_out = _windows(job)
    return [
        f"shape: {len(shapes)} candidates, from {shapes[0]} to {shapes[-1]}, for {limit}",
        f"search: at most {MOST_EVALUATIONS} trials, fitted to {fitted} windows and compared on "
        f"{held_out} others: about {duration(speed.seconds(_work(job)))}",
    ]


def _search(job: Job, earlier: ShapeResult | None) -> ShapeResult:
    """Runs the search, or continues an earlier one."""
    began, settings, chosen = time.perf_counter(), job.settings, 0
    measured = earlier is not None or settings.merge.budget.latency is None
    if earlier is not None:
        job = replace(job, shapes=_shapes(earlier))
    if not measured or len(job.shapes) > 1:
        remove_changed_layers(job.folder)
        model = job.load()
        windows = with_samples(job, model).windows
        if not measured:
            full = searched_channels(settings.merge, job.shape)
            times = measure_latency(model, windows[:1], full)
            log.info("latency of a prompt of %d tokens: %s", windows.shape[1], times)
            shapes = shapes_within_budget(settings.merge, job.shape, times)
            job = replace(job, shapes=shapes)
        for line in search_lines(job, Speed.measured(model.device, job.shape.dtype)):
            log.info(line)
        if len(job.shapes) > 1:
            held_out = windows[-_windows(job)[1] :]
            reference = DenseReference(model, held_out, settings.calibration.batch)
            del model
            trim_heap()
            job, chosen = _tried(job, windows, reference)
    return _write(job, chosen, time.perf_counter() - began)


def _tried(job: Job, windows: Tensor, reference: DenseReference) -> tuple[Job, int]:
    """The job with the divergences of the tried candidates, and the index of the lowest."""
    shapes = list(job.shapes)
    trials = TrialScores()  # of spans of the dense model, which all candidates share

    def divergence(index: int) -> float:
        own = shapes[index]
        if own.kl is None:
            kl = reference.divergence(_trial(job, own, windows[: _windows(job)[0]], trials))
            log.info("shape: %s, KL %.4f nats/token", own, kl)
            shapes[index] = own = replace(own, kl=kl)
            _write(replace(job, shapes=tuple(shapes)))
        assert own.kl is not None
        return own.kl

    chosen = lowest(find_minimum(len(shapes), divergence))
    return replace(job, shapes=tuple(shapes)), chosen


def _trial(
    job: Job, shape: CandidateShape, windows: Tensor, trials: TrialScores
) -> PreTrainedModel:
    """The dense model, loaded again and merged to a candidate with the surrogate of the refit."""
    settings = job.settings
    remove_changed_layers(job.folder)
    model = job.load()
    compress(
        model,
        windows,
        _trial_method(job, shape),
        target_layers=shape.layers,
        batch_size=settings.calibration.batch,
        store=settings.calibration.place,
        folder=job.folder,
        trials=trials,
    )
    return model


def _trial_method(job: Job, shape: CandidateShape) -> MergeSettings:
    method = job.with_shape(shape).settings.merge
    return replace(method, refit=method.refit.surrogate, schedule=method.schedule.surrogate)


def _windows(job: Job) -> tuple[int, int]:
    """How many of the first windows a trial is fitted to, and how many of the last compare it."""
    merge, count = job.settings.merge, job.settings.calibration.windows
    held_out = validation_windows(count)
    return min(max(merge.budget.windows, merge.min_windows), count - held_out), held_out


def _work(job: Job) -> Work:
    """The work of six trials, or fewer, spread over the candidates; all share scores of spans."""
    (fitted, _), length = _windows(job), job.settings.calibration.seq_len
    count = min(MOST_EVALUATIONS, len(job.shapes))
    tried = [job.shapes[n * (len(job.shapes) - 1) // (count - 1)] for n in range(count)]
    method, last = _trial_method(job, tried[-1]), tried[-1].layers
    work = trial_work(job.shape, method, last, *method.selection.trial_tokens(fitted, length))
    for shape in tried:
        method = _trial_method(job, shape)
        work += merge_work(job.shape, method, shape.layers, fitted * length)
    return work


def _shapes(search: ShapeResult) -> tuple[CandidateShape, ...]:
    return tuple(CandidateShape(**own) for own in search["candidates"])


def _earlier(job: Job) -> ShapeResult | None:
    """The search of an earlier session of this job."""

    def read(path: Path) -> ShapeResult | None:
        found = cast(ShapeResult, read_object(path))
        if found["job"] != job.hash:
            return None
        chosen, shapes = found["chosen"], _shapes(found)
        if chosen is not None and not 0 <= chosen < len(shapes):
            raise ValueError(f"there is no shape {chosen}")
        return found

    return read_again(job.folder / SHAPE, read)


def _write(job: Job, chosen: int | None = None, seconds: float = 0.0) -> ShapeResult:
    """Writes the candidates with the divergences known so far."""
    budget = job.settings.merge.budget
    search: ShapeResult = {
        "job": job.hash,
        "quantity": budget.quantity,
        "budget": budget.share,
        "seconds": seconds,
        "candidates": [asdict(shape) for shape in job.shapes],
        "chosen": chosen,
    }
    write_text(job.folder / SHAPE, json.dumps(search) + "\n")
    return search
