"""The dense model's evaluations, cached for all jobs that need the same ones."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from come.evaluate.base import Evaluation, Metrics, read_metrics
from come.files import (
    cache_folder,
    file_hash,
    package_hash,
    read_again,
    read_object,
    write_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_dense(
    evaluation: Evaluation,
    data: Any,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    identity: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Metrics:
    """Measures the dense model, or reads its metrics from the cache.

    The cache key includes the evaluation's settings and data, the model's files, the dtype, the
    device type, and the code.

    Args:
        evaluation: the evaluation.
        data: what its `prepare` returned.
        load: loads the dense model; called only if the metrics are not in the cache.
        tokenizer: its tokenizer.
        identity: identifies the dense model's files, including the tokenizer's.
        dtype: dtype of the model.
        device: device of the model.
    """
    key = json.dumps(
        [
            evaluation.name,
            evaluation.counted(),
            evaluation.key(data),
            file_hash(Path(inspect.getfile(type(evaluation)))),  # a plugin has code of its own
            identity,
            str(dtype),
            device.type,
            [torch.__version__, version("transformers"), package_hash()],
        ]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / "evaluations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # parallel jobs wait for the first
        known = read_again(path, lambda path: read_metrics(read_object(path)))
        if not known:
            measured = evaluation.measure(load(), tokenizer, data)
            records = {name: metric.record() for name, metric in measured.items()}
            write_text(path, json.dumps(records, allow_nan=False))
            known = read_metrics(read_object(path))
    return known
