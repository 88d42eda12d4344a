"""Zero-shot accuracy through EleutherAI's harness, in memory; the only module that imports it."""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.errors import one_line
from come.files import file_hash, local_hash
from come.text.windows import check_token_ids

# The harness takes seconds to import, so it is imported where it is used.

_GENERATED = 256  # tokens that the harness generates where a task does not say
_RESAMPLES = 1000  # of the standard errors that the harness has no formula for


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their documents, loaded once for all models of a run.

    Attributes:
        names: as they were asked for.
        limit: only the first so many documents of each; None for all.
        batch_size: sequences of one forward pass.
        loaded: the harness's tasks and groups.
        tasks: the tasks alone, by name.
        members: the tasks behind each name.
        manager: the harness's index of them.
        identity: hash of what determines the documents and prompts.
    """

    names: list[str]
    limit: int | None
    batch_size: int
    loaded: list[Any]
    tasks: dict[str, Any]
    members: dict[str, list[str]]
    manager: Any
    identity: str


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


def tasks_identity(names: Sequence[str], include_path: str | None, limit: int | None) -> str:
    """Hash of the tasks' names, of all local files that may define them, and of the harness.

    Files, folders and patterns that a YAML names count by their content, wherever they are.
    """
    parts = [*names, str(limit), version("lm-eval")]
    if include_path:
        folder = Path(include_path).expanduser()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            is_yaml = path.suffix in (".yaml", ".yml")
            content = " ".join(_contents(path)) if is_yaml else file_hash(path)
            parts += [str(path.relative_to(folder)), content]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _contents(path: Path, seen: tuple[Path, ...] = ()) -> list[str]:
    """What a task's YAML says, with the content of all that it names in place of paths."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _AnyTag)
    except (yaml.YAMLError, UnicodeDecodeError):
        return [file_hash(path)]
    found = []
    for word in _words(tree):
        beside = [p for n in (word, f"{word}.yaml") if (p := path.parent / n).is_file()]
        named = Path(word).expanduser().is_absolute() and local_hash(word)
        if named:
            found.append(named)
        elif beside and beside[0].suffix in (".yaml", ".yml") and beside[0] not in seen:
            found += _contents(beside[0], (*seen, path))
        else:
            found += [file_hash(beside[0])] if beside else [word]
    return found


def _words(tree: Any) -> Iterator[str]:
    """Keys and values of a tree, as text."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _words(value)
    else:
        yield str(tree)


class _AnyTag(yaml.SafeLoader):
    """Reads a tag of the harness, such as `!function`, as the text behind it."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def load_tasks(
    names: Sequence[str], *, include_path: str | None, limit: int | None, batch_size: int
) -> TaskSet:
    """Finds tasks by name and loads their documents; before any model, so that errors come early.

    Local tasks (YAML files below `include_path`) are found at once; the harness's own take 20
    seconds more to be indexed, and their data come from the hub.

    Raises:
        ValueError: no such folder or task, or documents that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).expanduser().is_dir():
        raise ValueError(f"eval.include_path={include_path}: no such folder")
    own = str(Path(include_path).expanduser()) if include_path else None
    with _quiet():
        manager = TaskManager(include_path=own, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=own)
    loaded: list[Any] = []
    tasks: dict[str, Any] = {}
    members: dict[str, list[str]] = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            where = f" in {include_path}" if include_path else ""
            raise ValueError(f"eval.tasks has {name!r}: no such task{where}{hint}")
        try:
            with _quiet():
                found = manager.load([name])
        except Exception as error:  # datasets raises errors of many kinds
            raise ValueError(
                f"eval.tasks has {name!r}: its documents cannot be read ({one_line(error)}); tasks "
                "of the hub need network, local ones files that are there "
                "(eval.include_path=FOLDER)"
            ) from error
        for task, built in found["tasks"].items():
            if built.get_config("output_type") == "loglikelihood_rolling":
                raise ValueError(
                    f"eval.tasks has {name!r}: {task} measures a text as a whole and has no score "
                    "for a document; eval.perplexity=true does that"
                )
        group = found["groups"].get(name)
        loaded += [group] if group is not None else list(found["tasks"].values())
        members[name] = list(found["tasks"])
        tasks |= found["tasks"]
    return TaskSet(
        list(names),
        limit,
        batch_size,
        loaded,
        tasks,
        members,
        manager,
        tasks_identity(names, include_path, limit),
    )


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
        tokenizer.pad_token_id = _prefix(tokenizer)
    with _quiet():
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


def check_tasks(
    tasks: TaskSet, tokenizer: PreTrainedTokenizerBase, rows: int, longest: int | None
) -> None:
    """Checks that the model can do the tasks, before anything is loaded.

    Args:
        tasks: from `load_tasks`.
        tokenizer: the model's tokenizer.
        rows: rows of the model's embedding.
        longest: tokens that the model reads at most, if there is a limit.

    Raises:
        ValueError: no begin or end token, which the harness puts where a prompt is empty, or one
            without a row in the embedding; another token of a prompt without a row; a task that
            generates without an end token or longer than the model reads; or one that would run
            code that the model writes.
    """
    for name, task in tasks.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
            raise ValueError(
                f"eval.tasks: {name} runs code that the model writes, which this project does not "
                "do; lm-eval's own command line can, on the saved model folder"
            )
        if task.get_config("output_type") != "generate_until":
            continue
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"eval.tasks: {name} generates up to an end token, and the tokenizer has none; "
                "name one as eos_token in tokenizer_config.json"
            )
        generated = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", _GENERATED)
        if longest is not None and generated >= longest:
            raise ValueError(
                f"eval.tasks: {name} generates {generated} tokens, and the model reads at most "
                f"{longest} with the prompt; set max_gen_toks in the task's generation_kwargs"
            )
    prefix = _prefix(tokenizer)
    if prefix is None or prefix >= rows:
        found = "has neither" if prefix is None else f"has one with id {prefix} (rows: {rows})"
        raise ValueError(
            f"eval.tasks={','.join(tasks.names)}: the harness needs a begin or end token that the "
            f"model's embedding has a row for, and the tokenizer {found}; name one as bos_token or "
            "eos_token in tokenizer_config.json, or measure with eval=perplexity"
        )
    if max(tokenizer.get_vocab().values()) < rows:
        return
    for name, task in tasks.tasks.items():  # some token has no row: does a prompt have it?
        with _quiet():
            task.build_all_requests(limit=tasks.limit, rank=0, world_size=1)
        words = [word for i in task.instances for word in i.args if isinstance(word, str) and word]
        ids = [i for word in words for i in tokenizer(word, add_special_tokens=False)["input_ids"]]
        check_token_ids(torch.tensor([ids]), rows, f"eval.tasks: a prompt of {name}", tokenizer)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int | None:
    begin = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's log to warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
