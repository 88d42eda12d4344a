"""Tasks of lm-eval: loading by name, hashing by content, and checks against the model."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from come.data.windows import check_token_ids
from come.errors import one_line
from come.files import file_hash, local_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The harness (lm-eval) takes seconds to import, so it is imported inside the functions.

_GENERATED = 256  # the harness's default for max_gen_toks


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their documents, loaded once for all models of a job.

    Attributes:
        names: requested names of tasks and groups.
        limit: number of first documents to use of each task; None for all.
        batch_size: sequences per forward pass.
        loaded: the harness's task and group objects.
        tasks: the tasks, including those of groups, by name.
        members: names of the tasks that each requested name refers to.
        manager: the harness's task manager.
        identity: hash of everything that determines the documents and prompts.
        evaluation: name of the evaluation, with which the names of its metrics begin.
    """

    names: list[str]
    limit: int | None
    batch_size: int
    loaded: list[Any]
    tasks: dict[str, Any]
    members: dict[str, list[str]]
    manager: Any
    identity: str
    evaluation: str = "zero_shot"

    @property
    def key(self) -> str:
        """Configuration key of the tasks, for error messages."""
        return f"eval.{self.evaluation}.tasks"


def tasks_identity(names: Sequence[str], include_path: str | None, limit: int | None) -> str:
    """Hash of the task names, the limit, all files in `include_path`, and the harness's version.

    Files, folders and glob patterns that a YAML file refers to are hashed by their content,
    wherever they are.
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
    """The words of a task's YAML file, with each path replaced by its content or a hash of it."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _AnyTag)
    except (yaml.YAMLError, UnicodeDecodeError):
        return [file_hash(path)]
    found = []
    for word in _words(tree):
        if os.path.isabs(os.path.expanduser(word)):
            found.append(local_hash(word) or word)
            continue
        nearby = [path.parent / name for name in (word, f"{word}.yaml")]
        # os.path and not Path: a word may be a whole prompt, which is not a valid file name
        named = next((p for p in nearby if os.path.isfile(p) and p not in (path, *seen)), None)
        if named is None:
            found.append(word)
        elif named.suffix in ("", ".yaml", ".yml"):
            found += _contents(named, (*seen, path))
        else:
            found.append(file_hash(named))
    return found


def _words(tree: Any) -> Iterator[str]:
    """All keys and values of a nested structure, as text."""
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
    """Reads a tag of the harness, such as `!function`, as plain text."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | None,
    limit: int | None,
    batch_size: int,
    evaluation: str = "zero_shot",
) -> TaskSet:
    """Finds tasks by name and loads their documents.

    This happens before any weights are loaded, so that errors occur early. Local tasks (YAML files
    in `include_path`) are found immediately. The harness's own tasks take 20 seconds more to index,
    and their data are downloaded from the hub.

    Raises:
        ValueError: there is no such folder or task, the documents cannot be read, or a task scores
            a text as a whole (`loglikelihood_rolling`).
    """
    from lm_eval.tasks import TaskManager

    folder_key, key = f"eval.{evaluation}.include_path", f"eval.{evaluation}.tasks"
    if include_path and not Path(include_path).expanduser().is_dir():
        raise ValueError(f"{folder_key}={include_path}: no such folder")
    own = str(Path(include_path).expanduser()) if include_path else None
    with quiet_harness():
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
            raise ValueError(f"{key} has {name!r}: no such task{where}{hint}")
        try:
            with quiet_harness():
                found = manager.load([name])
        except Exception as error:  # datasets raises many kinds of exceptions
            raise ValueError(
                f"{key} has {name!r}: its documents cannot be read ({one_line(error)}); tasks of "
                "the hub need network, local ones files that are there "
                f"({folder_key}=FOLDER)"
            ) from error
        for task, built in found["tasks"].items():
            if built.get_config("output_type") == "loglikelihood_rolling":
                raise ValueError(
                    f"{key} has {name!r}: {task} measures a text as a whole and has no score for "
                    "a document; eval=perplexity does that"
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
        evaluation,
    )


def check_tasks(
    tasks: TaskSet, tokenizer: PreTrainedTokenizerBase, rows: int, longest: int | None
) -> None:
    """Checks that the model can run the tasks; needs no weights.

    Args:
        tasks: the tasks, from `load_tasks`.
        tokenizer: the model's tokenizer.
        rows: number of rows of the model's embedding.
        longest: the model's maximum sequence length in tokens; None without a limit.

    Raises:
        ValueError: one of these holds:
            - The tokenizer has neither a begin nor an end token, which the harness uses as the
              context of an empty prompt, or that token has no row in the embedding.
            - Another token of a prompt has no row in the embedding.
            - A task generates text, and the tokenizer has no end token or the maximum length
              exceeds the model's.
            - A task executes code that the model writes.
    """
    for name, task in tasks.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
            raise ValueError(
                f"{tasks.key}: {name} runs code that the model writes, which this project does not "
                "do; lm-eval's own command line can, on the saved model folder"
            )
        if task.get_config("output_type") != "generate_until":
            continue
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tasks.key}: {name} generates up to an end token, and the tokenizer has none; "
                "name one as eos_token in tokenizer_config.json"
            )
        generated = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", _GENERATED)
        if longest is not None and generated >= longest:
            raise ValueError(
                f"{tasks.key}: {name} generates {generated} tokens, and the model reads at most "
                f"{longest} with the prompt; set max_gen_toks in the task's generation_kwargs"
            )
    prefix = prefix_token(tokenizer)
    if prefix is None or prefix >= rows:
        found = "has neither" if prefix is None else f"has one with id {prefix} (rows: {rows})"
        raise ValueError(
            f"{tasks.key}={','.join(tasks.names)}: the harness needs a begin or end token that the "
            f"model's embedding has a row for, and the tokenizer {found}; name one as bos_token or "
            "eos_token in tokenizer_config.json, or measure with eval=perplexity"
        )
    if max(tokenizer.get_vocab().values()) < rows:
        return
    for name, task in tasks.tasks.items():  # some token has no row: check the prompts
        with quiet_harness():
            task.build_all_requests(limit=tasks.limit, rank=0, world_size=1)
        words = [word for i in task.instances for word in i.args if isinstance(word, str) and word]
        ids = [i for word in words for i in tokenizer(word)["input_ids"]]
        check_token_ids(torch.tensor([ids]), rows, f"{tasks.key}: a prompt of {name}", tokenizer)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the harness uses as the context of an empty prompt."""
    begin = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silences the harness's log messages below the level ERROR."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
