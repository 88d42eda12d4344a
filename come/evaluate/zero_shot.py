"""Zero-shot accuracy of a model in memory, by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, Relative, Subject
from come.evaluate.paired import mean_difference
from come.evaluate.tasks import (
    TaskSet,
    check_tasks,
    load_tasks,
    prefix_token,
    quiet_harness,
    tasks_identity,
)
from come.setting import setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_RESAMPLES = 1000  # bootstrap resamples for standard errors without a closed form
_NORMAL = 1.959964  # 97.5% quantile of the normal distribution


@EVALUATIONS.register
@dataclass
class ZeroShot(Evaluation):
    """Accuracy on zero-shot tasks of lm-eval, compared with the dense model by document."""

    name = "zero_shot"

    tasks: list[str] = setting(
        ["arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "mmlu"],
        "tasks and groups of lm-eval, or of include_path",
    )
    include_path: Optional[str] = setting(
        None,
        "folder of local tasks, YAML files as lm-eval's",
        kind=str,
        optional=True,
        counts=False,
    )
    limit: Optional[int] = setting(
        None, "only the first documents of every task; null for all", kind=int, least=1,
        optional=True,
    )  # fmt: skip
    batch_size: int = setting(8, "sequences of a forward pass", least=1)

    def check(self) -> None:
        """Raises ValueError if there is no task, or a task is named twice."""
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            problem = "names a task twice" if self.tasks else "names no task"
            raise ValueError(f"{self.config_key}.tasks={list(self.tasks)} {problem}")

    def identity(self) -> str:
        """Hash of the tasks."""
        return tasks_identity(self.tasks, self.include_path, self.limit)

    def prepare(self, subject: Subject) -> TaskSet:
        """The tasks with their documents."""
        tasks = load_tasks(
            self.tasks,
            include_path=self.include_path,
            limit=self.limit,
            batch_size=self.batch_size,
            evaluation=self.name,
        )
        check_tasks(tasks, subject.tokenizer, subject.vocabulary, subject.longest)
        return tasks

    def key(self, data: TaskSet) -> Any:
        """Hash of the tasks."""
        return data.identity

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TaskSet
    ) -> Metrics:
        """See `zero_shot`."""
        return zero_shot(model, tokenizer, data)

    @classmethod
    def compare(cls, own: Metrics, dense: Metrics, removed: float = 0.0) -> Metrics:
        """Differences of all metrics; groups have a paired bootstrap interval over their tasks.

        The tasks of a group are weighted by their documents; the average weights all requested
        tasks and groups equally.
        """
        found = super().compare(own, dense, removed)
        for name, metric in own.items():
            groups = metric.details.get("groups")
            if not groups:
                continue
            pairs = [
                [
                    (own[f"{cls.name}/{t}"].samples, dense[f"{cls.name}/{t}"].samples)
                    for t in members
                ]
                for members in groups.values()
            ]
            gap = metric.value - dense[name].value
            if all(own and its for group in pairs for own, its in group):
                relative = Relative(gap, *mean_difference(pairs))
            else:
                relative = Relative(gap)
            found[name] = replace(metric, relative=relative)
        return found


def headline(metrics: Mapping[str, float]) -> str:
    """Name of a task's headline metric: acc if it has one, otherwise its first metric."""
    return "acc" if "acc" in metrics else next(iter(metrics))


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: TaskSet
) -> Metrics:
    """Runs the tasks on a model in memory, without saving the model or caching answers.

    Prompts, numbers of few-shot examples and metrics are those of the task definitions. The
    harness seeds all global random generators.

    Returns:
        For every task, its headline metric as "zero_shot/TASK" and the others as
        "zero_shot/TASK/METRIC", with normal intervals from the harness's standard errors; for every
        requested group, the harness's aggregate, or the mean over its tasks if there is none; and
        as "zero_shot" the mean over the requested tasks and groups. With another
        `tasks.evaluation`, names begin with that. Samples are the scores of the
        documents, in order; a metric that is not their mean (a correlation, F1, BLEU) has none.

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
                f"{tasks.key}={','.join(tasks.names)}: a metric is too large for a number; leave "
                "the task out, or measure text with eval=perplexity"
            ) from error
    assert found is not None
    metrics: Metrics = {}
    prefix = tasks.evaluation
    for name, samples in found["samples"].items():
        _check_answers(name, samples, model)
        metrics |= _task_metrics(name, found["results"][name], samples, prefix)
    values = {}
    for name, members in tasks.members.items():
        own = [metrics[f"{prefix}/{task}"].value for task in members]
        whole = _plain(found["results"].get(name, {}))
        values[name] = whole[headline(whole)] if whole else sum(own) / len(own)
        if name not in members:
            metrics[f"{prefix}/{name}"] = Metric(
                values[name], comparison="difference", details={"groups": {name: members}}
            )
    average = Metric(
        sum(values.values()) / len(values),
        comparison="difference",
        data=f"mean of {', '.join(values)}",
        headline=True,
        details={"groups": tasks.members},
    )
    return {prefix: average, **metrics}


def _task_metrics(
    name: str,
    result: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    prefix: str = "zero_shot",
) -> Metrics:
    """The metrics of one task, of the first filter if it has several."""
    plain = _plain(result)
    if not plain:
        raise ValueError(f"{prefix}: no metric of {name} is a finite number")
    only = samples[0].get("filter")
    ordered = sorted((s for s in samples if s.get("filter") == only), key=itemgetter("doc_id"))
    metrics = {}
    for key, value in plain.items():
        if key.endswith("_stderr"):
            continue
        place = f"{prefix}/{name}" if key == headline(plain) else f"{prefix}/{name}/{key}"
        error = plain.get(f"{key}_stderr")
        metrics[place] = Metric(
            value,
            None if error is None else value - _NORMAL * error,
            None if error is None else value + _NORMAL * error,
            comparison="difference",
            samples=_scores([sample.get(key) for sample in ordered], value),
            data=f"{len(ordered)} documents",
            details={"metric": key, "stderr": error},
        )
    return metrics


def _check_answers(name: str, samples: Sequence[Mapping[str, Any]], model: PreTrainedModel) -> None:
    """Raises ValueError if a log-likelihood is NaN, because the choice would then be arbitrary."""
    for sample in samples:
        for answers in sample["resps"]:
            for answer in answers:
                first = answer[0] if isinstance(answer, tuple | list) and answer else answer
                if isinstance(first, float) and math.isnan(first):
                    raise ValueError(
                        f"lm-eval: a log-likelihood of {name} is not a number; the model's "
                        f"predictions overflow in {model.dtype}: try model.dtype=float32 or "
                        "bfloat16"
                    )


def _scores(values: Sequence[Any], metric: float) -> list[float]:
    """The score of every document; empty if the metric is not the mean of these scores."""
    if not all(isinstance(value, Real | np.bool_) for value in values):
        return []
    scores = [float(value) for value in values]
    return scores if math.isclose(sum(scores) / len(scores), metric, abs_tol=1e-6) else []


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
