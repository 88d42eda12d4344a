"""The stored hidden states of a job's teacher, cached between jobs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from come.data.windows import TokenWindows
from come.distill.stored_states import StoredStates
from come.files import cache_folder, package_hash
from come.job.job import Job
from come.models.adapter import ModelAdapter
from come.models.checkpoint import identity
from come.report.numbers import megabytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FOLDER = "teacher"  # in the cache folder


def stored_states(
    job: Job,
    after: Sequence[int],
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
) -> StoredStates:
    """The teacher's states for all windows. Those that an earlier job wrote are used again.

    Args:
        job: the job.
        after: the layers after which states are stored.
        accelerator: the processes, among which the pass is divided.
        teacher: the dense model.
        windows: token ids.

    Raises:
        ValueError: the disk is too small.
    """
    text = TokenWindows(windows, windows.numel(), "").hash
    adapter = ModelAdapter(teacher)
    key = [
        identity(job.checkpoint),
        package_hash(),
        str(teacher.dtype),
        teacher.device.type,
        job.settings.model.trust_remote_code,
        *after,
        text,
        *(version(package) for package in ("torch", "transformers")),
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = cache_folder() / FOLDER / name
    found = StoredStates(folder, windows, after, adapter.config.hidden_size, teacher.dtype)
    log.info(
        "teacher: its hidden states after %d layers for %d tokens, %s in %s",
        len(found.after), windows.numel(), megabytes(found.size), folder,
    )  # fmt: skip
    found.write(
        adapter,
        job.settings.distill.micro_batch,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    return found
