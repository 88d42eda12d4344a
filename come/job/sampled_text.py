"""Text that a job samples from its dense model, cached between jobs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from come.data.mix import interleaved
from come.data.prompts import chat_prompts
from come.data.sampling import (
    SOURCE,
    cached,
    continued_windows,
    self_generated_windows,
    unused_ids,
)
from come.data.windows import TokenWindows, begin_token
from come.files import package_hash
from come.job.budget import sampling_cost
from come.job.job import Job
from come.models.checkpoint import identity
from come.models.shape import ModelShape
from come.schema import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    if count := settings.sampled_windows:
        found = _self_generated(job, model, count, settings.seq_len, settings.seed)
        found = replace(found, source=settings.described(SOURCE, found.source))
        return found if given is None else interleaved([found, given])
    assert given is not None
    if not settings.num_continuations:
        return given
    sizes = [settings.num_continuations, settings.prefix_tokens, settings.seed]

    def make() -> TokenWindows:
        _warn_of_cost(job)
        return continued_windows(
            model,
            given,
            count=settings.num_continuations,
            begin=settings.prefix_tokens,
            seed=settings.seed,
            sampling=settings.sampling,
            banned=unused_ids(model, job.tokenizer),
        )

    return cached(sampling_key(job, model, [given.hash, *sizes]), make)


def sampled(job: Job, teacher: PreTrainedModel, windows: int) -> TokenWindows:
    """Training text sampled from the dense model; cached, and different from calibration text."""
    settings = job.settings.distill
    count = windows + settings.validation_samples
    return _self_generated(job, teacher, count, settings.seq_len, settings.seed + SEED_OFFSET)


def _self_generated(
    job: Job, model: PreTrainedModel, count: int, seq_len: int, seed: int
) -> TokenWindows:
    """Windows sampled from the dense model; with `calibration.chat`, its answers to prompts."""
    how = job.settings.calibration
    prompts = prompts_of(job.settings, job.shape, job.tokenizer)

    def make() -> TokenWindows:
        _warn_of_cost(job)
        return self_generated_windows(
            model,
            num_samples=count,
            seq_len=seq_len,
            seed=seed,
            sampling=how.sampling,
            keep=how.keep_likeliest,
            banned=unused_ids(model, job.tokenizer),
            prompts=prompts,
        )

    return cached(
        sampling_key(job, model, [count, seq_len, seed, how.keep_likeliest, prompts]), make
    )


def prompts_of(
    settings: Settings, shape: ModelShape, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the prompts that the model answers; none without `calibration.chat`.

    Raises:
        ValueError: the tokenizer has no chat template, or cannot render a user turn with it.
    """
    if not settings.calibration.chat:
        return []
    begin = begin_token(settings.model.begin_token, shape.begin_token, tokenizer)
    try:
        return chat_prompts(tokenizer, begin)
    except ValueError as error:
        raise ValueError(f"calibration.chat=true: {error}") from error


def _warn_of_cost(job: Job) -> None:
    if (read := sampling_cost(job.settings, job.shape)) is not None:
        log.warning(read)
