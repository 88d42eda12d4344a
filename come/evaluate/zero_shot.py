"""Zero-shot accuracy through EleutherAI's harness, in memory."""

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


_RESAMPLES = 1000  # of the standard errors that the harness has no formula for


@dataclass(frozen=True)
class ZeroShot:
    """What one model does on the tasks.

    Attributes:
        metrics: of every task its metrics by name, and "METRIC_stderr" of each.
        scores: of every task the metric that counts, a number for every document in their order;
            None where that metric is not a mean over documents (a correlation, F1, BLEU).
        documents: of every task how many.
        values: of every task or group that was asked for the metric that counts; of a group the
            harness's own aggregate, or the mean over its tasks.
        members: the tasks behind each of those.
    """

    metrics: dict[str, dict[str, float]]
    scores: dict[str, list[float] | None]
    documents: dict[str, int]
    values: dict[str, float]
    members: dict[str, list[str]]

    def value(self, task: str) -> float:
        """The metric of a task that counts."""
        return self.metrics[task][headline(self.metrics[task])]

    @property
    def average(self) -> float:
        """Mean over what was asked for, a group counting as much as a task."""
        return sum(self.values.values()) / len(self.values)


def headline(metrics: Mapping[str, float]) -> str:
    """The metric of a task that counts: acc where there is one, else its first."""
    return "acc" if "acc" in metrics else next(iter(metrics))


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet
) -> ZeroShot:
    """Runs the tasks on a model that is in memory; nothing is saved, no answer is cached.

    Prompts, few-shot numbers and metrics are the tasks' own. The harness seeds all global
    generators.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: from `load_tasks`.

    Raises:
        ValueError: see `check_tasks`; or predictions or metrics that are not finite.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config, "max_position_embeddings", None)
    check_tasks(tasks, tokenizer, rows, longest)
    tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token_id = prefix_token(tokenizer)
    with quiet_harness():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=tasks.batch_size)
        if not sys.stderr.isatty():  # a line for every step of a bar fills a job's log
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
        only = samples[0].get("filter")  # of several filters the first counts
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
    """Checks that log-likelihoods are numbers: of an answer that is not one, any would win."""
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
    """One number for each document, or None unless the metric is the mean of such numbers."""
    if not all(isinstance(value, Real | np.bool_) for value in values):
        return None
    scores = [float(value) for value in values]
    return scores if math.isclose(sum(scores) / len(scores), metric, abs_tol=1e-6) else None


def _document(sample: Mapping[str, Any]) -> int:
    return sample["doc_id"]


def _plain(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by plain names, of several filters the first: "acc_stderr,none" -> "acc_stderr".

    What is not a finite number, as the standard error of one document, is left out.
    """
    plain: dict[str, float] = {}
    for key, value in result.items():
        if "," in key and isinstance(value, int | float) and math.isfinite(value):
            plain.setdefault(key.partition(",")[0], float(value))
    return plain
