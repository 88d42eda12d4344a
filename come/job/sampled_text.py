"""Text that a job samples from its dense model, cached between jobs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save
from torch import Tensor

from come.data.mix import interleaved
from come.data.prompts import chat_prompts
from come.data.sampling import (
    BATCH,
    SOURCE,
    cached,
    continuation_starts,
    continued_windows,
    sample,
    self_generated_windows,
    unused_ids,
)
from come.data.windows import TokenWindows, begin_token, shifted
from come.files import package_hash, write_bytes
from come.job.budget import sampling_cost
from come.job.job import Job
from come.models.checkpoint import identity
from come.models.shape import ModelShape
from come.schema import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SEED_OFFSET = 1_000_003  # of training text, so that it differs from calibration text
TOGETHER = 64  # windows of training text that are sampled in parallel


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
    """Validation and training text written by the dense model, different from calibration text.

    `windows` is the number of training windows. They are sampled in blocks, and each block is
    cached, so that an interrupted job goes on with the next block.
    """
    size = job.settings.distill.block
    counts = [min(size, windows - first) for first in range(0, windows, size)]
    blocks = [text_block(job, teacher, number, count) for number, count in enumerate(counts)]
    parts = [validation_text(job, teacher), *blocks]
    return replace(
        parts[0],
        windows=torch.cat([part.windows for part in parts]),
        corpus_tokens=sum(part.corpus_tokens for part in parts),
    )


def validation_text(job: Job, teacher: PreTrainedModel) -> TokenWindows:
    """Held-out windows written by the dense model; cached."""
    return text_block(job, teacher, -1, job.settings.distill.validation_samples)


def text_block(job: Job, teacher: PreTrainedModel, number: int, count: int) -> TokenWindows:
    """A block of training windows written by the dense model; cached.

    With `distill.prefix_tokens`, they continue beginnings of the training text. Otherwise a share
    `distill.shifted` of them is shifted, because all begin with the begin token.

    Args:
        job: the job.
        teacher: the dense model.
        number: number of the block; -1 for the validation windows.
        count: number of windows.
    """
    settings, how = job.settings.distill, job.settings.calibration.sampling
    seed = settings.seed + SEED_OFFSET * (number + 2)
    if job.training is None:
        found = _self_generated(job, teacher, count, settings.seq_len, seed, TOGETHER)
        windows = shifted(found.windows, settings.shifted, teacher.config.bos_token_id)
        return replace(found, windows=windows)
    begin, text, held_out = settings.prefix_tokens, job.training, settings.validation_samples
    if number < 0:
        starts = continuation_starts(text.windows[:held_out], count, begin)
    else:
        total, first = settings.train_config("cpu").windows, number * settings.block
        starts = continuation_starts(text.windows[held_out:], total, begin)[first : first + count]

    def make() -> TokenWindows:
        generator = torch.Generator().manual_seed(seed)
        banned = unused_ids(teacher, job.tokenizer)
        windows = sample(
            teacher,
            starts,
            settings.seq_len,
            how,
            generator,
            banned=banned,
            batch_size=TOGETHER,
        )
        source = f"{text.source}, continued from {begin} tokens each ({how})"
        return replace(text, windows=windows, source=source)

    return cached(sampling_key(job, teacher, [replace(text, windows=starts).hash, seed]), make)


@torch.no_grad()
def student_block(
    job: Job, student: PreTrainedModel, number: int, count: int, folder: Path
) -> Int[Tensor, "windows seq"]:
    """Windows written by the model in training, in a file of the job, which a resumed run reads.

    Args:
        job: the job.
        student: the model as it is when the block is made.
        number: number of the block.
        count: number of windows.
        folder: folder of the files.
    """
    path = folder / f"student-{job.hash}-{number:05d}.safetensors"
    if not path.is_file():
        settings = job.settings.distill
        found = self_generated_windows(
            student,
            num_samples=count,
            seq_len=settings.seq_len,
            seed=settings.seed + SEED_OFFSET * (number + 2) + 1,
            sampling=job.settings.calibration.sampling,
            banned=unused_ids(student, job.tokenizer),
            prompts=prompts_of(job.settings, job.shape, job.tokenizer),
            batch_size=TOGETHER,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({"windows": found.windows.contiguous()}))
    windows = load_file(path)["windows"]
    return shifted(windows, job.settings.distill.shifted, student.config.bos_token_id)


def _self_generated(
    job: Job, model: PreTrainedModel, count: int, seq_len: int, seed: int, together: int = BATCH
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
            batch_size=together,
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
