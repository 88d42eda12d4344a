"""Zero-shot accuracy of a model in memory, by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from come.evaluate.tasks import TaskSet, check_tasks, prefix_token, quiet_harness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_RESAMPLES = 1000  # bootstrap resamples for standard errors without a closed form


@dataclass(frozen=True)
class ZeroShot:
    """The results of one model on the zero-shot tasks.

    Attributes:
        metrics: for every task, its metrics by name, with their standard errors as
            "METRIC_stderr".
        scores: for every task, the headline metric of every document, in order; None if that
            metric is not a mean over documents (a correlation, F1, BLEU).
        documents: number of documents of every task.
        values: headline metric of every requested task or group; for a group, the harness's
            aggregate, or the mean over its tasks if there is none.
        members: names of the tasks that each requested name stands for.
    """

    metrics: dict[str, dict[str, float]]
    scores: dict[str, list[float] | None]
    documents: dict[str, int]
    values: dict[str, float]
    members: dict[str, list[str]]

    def value(self, task: str) -> float:
        """The headline metric of a task."""
        return self.metrics[task][headline(self.metrics[task])]

    @property
    def average(self) -> float:
        """Mean of `values`; a group has the same weight as a task."""
        return sum(self.values.values()) / len(self.values)


def headline(metrics: Mapping[str, float]) -> str:
    """Name of a task's headline metric: acc if it has one, otherwise its first metric."""
    return "acc" if "acc" in metrics else next(iter(metrics))


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet
) -> ZeroShot:
    """Runs the tasks on a model in memory, without saving the model or caching answers.

    Prompts, numbers of few-shot examples and metrics are those of the task definitions. The
    harness seeds all global random generators.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: the tasks, from `load_tasks`.

    Raises:
        ValueError: see `check_tasks`; also if a log-likelihood is NaN, a metric overflows, or a
            task has no finite metric.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config, "max_position_embeddings", None)
    check_tasks(tasks, tokenizer, rows, longest)
    tokenizer = copy.deepcopy(tokenizer)  # the harness sets its padding token
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token_id = prefix_token(tokenizer)
    with quiet_harness():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=tasks.batch_size)
        if not sys.stderr.isatty():  # in a log file, every update is a line
            for kind in ("loglikelihood", "generate_until"):
                setattr(wrapped, kind, partial(getattr(wrapped, kind), disable_tqdm=True))
        try:
            found = simple_evaluate(
                model=wrapped,
                tasks=tasks.loaded,
                task_manager=tasks.manager,
                limit=tasks.limit,
                batch_size=tasks.batch_size,
                bootstrap_iters=_RESAMPLES,
                log_samples=True,
            )
        except OverflowError as error:
            raise ValueError(
                f"zero-shot: a metric of {', '.join(tasks.names)} is too large for a number; leave "
                "the task out, or measure text with eval=perplexity"
            ) from error
    assert found is not None
    metrics: dict[str, dict[str, float]] = {}
    scores: dict[str, list[float] | None] = {}
    documents: dict[str, int] = {}
    for name, samples in found["samples"].items():
        _check_answers(name, samples, model)
        metrics[name] = _plain(found["results"][name])
        if not metrics[name]:
            raise ValueError(f"zero-shot: no metric of {name} is a finite number")
        counts = headline(metrics[name])
        only = samples[0].get("filter")  # use the first of several filters
        ordered = sorted((s for s in samples if s.get("filter") == only), key=_document)
        documents[name] = len(ordered)
        scores[name] = _scores([sample[counts] for sample in ordered], metrics[name][counts])
    values = {}
    for name, members in tasks.members.items():
        whole = _plain(found["results"].get(name, {}))
        own = [metrics[task][headline(metrics[task])] for task in members]
        values[name] = whole[headline(whole)] if whole else sum(own) / len(own)
    return ZeroShot(metrics, scores, documents, values, tasks.members)


def _check_answers(name: str, samples: Sequence[Mapping[str, Any]], model: PreTrainedModel) -> None:
    """Raises ValueError if a log-likelihood is NaN, because the choice would then be arbitrary."""
    for sample in samples:
        for answers in sample["resps"]:
            for answer in answers:
                first = answer[0] if isinstance(answer, tuple | list) and answer else answer
                if isinstance(first, float) and math.isnan(first):
                    raise ValueError(
                        f"zero-shot: a log-likelihood of {name} is not a number; the model's "
                        f"predictions overflow in {model.dtype}: try model.dtype=float32 or "
                        "bfloat16"
                    )


def _scores(values: Sequence[Any], metric: float) -> list[float] | None:
    """The score of every document, or None if the metric is not the mean of these scores."""
    if not all(isinstance(value, Real | np.bool_) for value in values):
        return None
    scores = [float(value) for value in values]
    return scores if math.isclose(sum(scores) / len(scores), metric, abs_tol=1e-6) else None


def _document(sample: Mapping[str, Any]) -> int:
    return sample["doc_id"]


def _plain(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics without the filter in their names: "acc_stderr,none" becomes "acc_stderr".

    The first of several filters is used. Values that are not finite, such as the standard error
    of a single document, are omitted.
    """
    plain: dict[str, float] = {}
    for key, value in result.items():
        if "," in key and isinstance(value, int | float) and math.isfinite(value):
            plain.setdefault(key.partition(",")[0], float(value))
    return plain
