"""Windows that a job trains and validates on, with the teacher's states if they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from come.data.windows import TokenWindows
from come.distill.config import TrainConfig
from come.distill.stored_states import StoredStates
from come.distill.trainer import Batch
from come.job.job import Job
from come.job.sampled_text import sampled, student_block, text_block, validation_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Store = Callable[["PreTrainedModel", Int[Tensor, "windows seq"]], StoredStates]
"""(teacher, windows) -> the teacher's states, stored."""


def complete_text(job: Job, teacher: PreTrainedModel, config: TrainConfig) -> TokenWindows:
    """Validation windows, followed by the training windows that are made before the first step.

    These are all, or none if training starts before they are there (see `StreamedText`).
    """
    settings = job.settings.distill
    writes = job.training is None or settings.prefix_tokens
    if not settings.streams:
        return sampled(job, teacher, config.windows) if writes else _read(job)
    if writes:
        return validation_text(job, teacher)
    text = _read(job)
    return replace(text, windows=text.windows[: settings.validation_samples])


def _read(job: Job) -> TokenWindows:
    assert job.training is not None
    return job.training


class CompleteText:
    """Windows that are all there before training, and their states if the teacher is stored.

    Args:
        windows: token ids.
        states: the teacher's states of these windows; None for a live teacher.
        first: index of the window that is number 0.
    """

    def __init__(
        self, windows: Int[Tensor, "windows seq"], states: StoredStates | None, first: int = 0
    ) -> None:
        self._windows, self._states, self._first = windows, states, first

    def __call__(self, rows: Int[Tensor, " batch"]) -> Batch:
        """The windows with these numbers, followed by their states."""
        rows = rows + self._first
        return self._windows[rows], *(self._states.read(rows) if self._states else ())

    def prepare(self, rows: Int[Tensor, " batch"]) -> None:
        """Does nothing: all windows are there."""


class StreamedText:
    """Training windows in blocks, each made when the first step needs it.

    A share `distill.on_policy` of every block is written by the model in training, the rest by the
    dense model or read from the text. The teacher's states are those of the dense model for all
    of them. A stored teacher is loaded while a block is made.

    Args:
        job: the job.
        student: the model in training.
        teacher: the dense model; None if it is stored.
        store: stores the teacher's states of a block; None for a live teacher.
        config: number of windows.
        folder: folder for the windows that the student writes.
        accelerator: the processes, which all make blocks at the same steps.
    """

    def __init__(
        self,
        job: Job,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        store: Store | None,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self._job, self._student, self._teacher, self._store = job, student, teacher, store
        self._config, self._folder, self._accelerator = config, folder, accelerator
        self._size = job.settings.distill.block
        self._blocks: dict[int, CompleteText] = {}

    def prepare(self, rows: Int[Tensor, " batch"]) -> None:
        """Makes the blocks of the windows with these numbers."""
        for number in sorted({row // self._size for row in rows.tolist()}):
            if number not in self._blocks:
                self._blocks[number] = self._make(number)

    def __call__(self, rows: Int[Tensor, " batch"]) -> Batch:
        """The windows with these numbers, followed by their states."""
        parts = [self._blocks[row // self._size](torch.tensor([row % self._size])) for row in
                 rows.tolist()]  # fmt: skip
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _make(self, number: int) -> CompleteText:
        job, accelerator = self._job, self._accelerator
        count = min(self._size, self._config.windows - number * self._size)
        own = round(job.settings.distill.on_policy * count)
        needed = self._teacher is None and (self._store or own < count)
        teacher = job.load(device=str(accelerator.device)) if needed else self._teacher
        with accelerator.main_process_first():  # the others read what the first one writes
            parts = [self._given(teacher, number, count - own)] if own < count else []
            if own:
                with accelerator.autocast():
                    written = student_block(job, self._student, number, own, self._folder)
                parts.append(written)
        seed = job.settings.distill.seed * 1_000_003 + number + 1
        generator = torch.Generator().manual_seed(seed)
        windows = torch.cat(parts)[torch.randperm(count, generator=generator)]
        if self._store is None:
            return CompleteText(windows, None)
        assert teacher is not None
        return CompleteText(windows, self._store(teacher, windows))

    def _given(
        self, teacher: PreTrainedModel | None, number: int, count: int
    ) -> Int[Tensor, "windows seq"]:
        """The windows of a block that the student does not write."""
        settings = self._job.settings.distill
        if self._job.training is None or settings.prefix_tokens:
            assert teacher is not None
            return text_block(self._job, teacher, number, count).windows
        text = self._job.training.windows[settings.validation_samples :]
        first = number * self._size
        return text[(first + torch.arange(count)) % len(text)]
