"""Text that a job samples from its dense model, cached between jobs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from come.data.sampling import cached, continued_windows, self_generated_windows, unused_ids
from come.data.windows import TokenWindows
from come.files import package_hash
from come.job.budget import sampling_cost
from come.job.job import Job
from come.models.checkpoint import identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SEED_OFFSET = 1_000_003  # of training text, so that it differs from calibration text


def sampling_key(job: Job, model: PreTrainedModel, settings: Sequence[Any]) -> list[Any]:
    """Cache key of text sampled from the dense model: everything that determines it."""
    return [
        identity(job.checkpoint),
        package_hash(),
        str(model.dtype),
        model.device.type,
        job.settings.model.trust_remote_code,
        str(job.settings.calibration.sampling),
        *settings,
        *(version(package) for package in ("torch", "transformers")),
    ]


def with_samples(job: Job, model: PreTrainedModel) -> TokenWindows:
    """The calibration windows, including those sampled from the model, which are cached."""
    given, settings = job.calibration, job.settings.calibration
    if given is not None and not settings.num_continuations:
        return given
    sizes = [settings.num_samples, settings.seq_len, settings.seed, settings.keep_likeliest]
    continued = [given.hash if given else None, settings.num_continuations, settings.prefix_tokens]
    key = sampling_key(job, model, [*sizes, *continued])
    banned = unused_ids(model, job.tokenizer)

    def make() -> TokenWindows:
        if (read := sampling_cost(job.settings, job.shape)) is not None:
            log.warning(read)
        if given is None:
            return self_generated_windows(
                model,
                num_samples=settings.num_samples,
                seq_len=settings.seq_len,
                seed=settings.seed,
                sampling=settings.sampling,
                keep=settings.keep_likeliest,
                banned=banned,
            )
        return continued_windows(
            model,
            given,
            count=settings.num_continuations,
            begin=settings.prefix_tokens,
            seed=settings.seed,
            sampling=settings.sampling,
            banned=banned,
        )

    return cached(key, make)


def sampled(job: Job, teacher: PreTrainedModel, windows: int) -> TokenWindows:
    """Training text sampled from the dense model; cached, and different from calibration text."""
    settings, how = job.settings.distill, job.settings.calibration
    seed = settings.seed + SEED_OFFSET
    count = windows + settings.validation_samples
    sizes = [count, settings.seq_len, seed, how.keep_likeliest]
    return cached(
        sampling_key(job, teacher, sizes),
        lambda: self_generated_windows(
            teacher,
            num_samples=count,
            seq_len=settings.seq_len,
            seed=seed,
            sampling=how.sampling,
            keep=how.keep_likeliest,
            banned=unused_ids(teacher, job.tokenizer),
        ),
    )
