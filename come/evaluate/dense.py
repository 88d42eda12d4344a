"""Evaluates one model; caches the dense model's evaluation for all jobs that need the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from come.data.windows import TokenWindows
from come.evaluate.continuations import PROMPTS, continuations
from come.evaluate.perplexity import Perplexity, perplexity
from come.evaluate.tasks import TaskSet
from come.evaluate.zero_shot import ZeroShot, zero_shot
from come.files import cache_folder, package_hash, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model that need no other model.

    Attributes:
        perplexity: perplexity on every held-out text, by name.
        continuations: continuations of the report's prompts, in order.
        zero_shot: results on the zero-shot tasks; None without tasks.
    """

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    continuations: list[str] = field(default_factory=list)
    zero_shot: ZeroShot | None = None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, TokenWindows],
    tasks: TaskSet | None = None,
    *,
    batch_tokens: int,
    new_tokens: int,
) -> Evaluation:
    """Measures perplexity and zero-shot tasks, and generates continuations of `new_tokens` tokens.

    Nothing is measured for an empty `texts`, for `tasks=None` and for `new_tokens=0`.
    """
    return Evaluation(
        {
            name: perplexity(model, text.windows, batch_tokens=batch_tokens)
            for name, text in texts.items()
        },
        continuations(model, tokenizer, new_tokens=new_tokens) if new_tokens else [],
        zero_shot(model, tokenizer, tasks) if tasks else None,
    )


def evaluate_dense(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, TokenWindows],
    tasks: TaskSet | None = None,
    *,
    identity: str,
    dtype: torch.dtype,
    device: torch.device,
    batch_tokens: int,
    new_tokens: int,
) -> Evaluation:
    """Runs `evaluate` on the dense model, or reads its result from the cache.

    Args:
        load: loads the dense model; called only if the result is not in the cache.
        tokenizer: its tokenizer.
        texts: held-out windows by name.
        tasks: zero-shot tasks.
        identity: identifies the dense model's files, including the tokenizer's.
        dtype: dtype of the model.
        device: device of the model; its type is part of the cache key.
        batch_tokens: tokens per forward pass.
        new_tokens: tokens per continuation.
    """
    if not (texts or new_tokens or tasks):
        return Evaluation()
    key = json.dumps(
        [
            identity,
            str(dtype),
            {name: text.hash for name, text in texts.items()},
            [PROMPTS, new_tokens],
            device.type,
            [torch.__version__, version("transformers"), package_hash()],
            batch_tokens,
            [tasks.identity, tasks.batch_size] if tasks else None,
        ]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / "evaluations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # parallel jobs wait for the first
        if not path.is_file():
            measured = evaluate(
                load(), tokenizer, texts, tasks, batch_tokens=batch_tokens, new_tokens=new_tokens
            )
            write_text(path, json.dumps(asdict(measured), allow_nan=False))
    return _read(path)


def _read(path: Path) -> Evaluation:
    data = json.loads(path.read_text())
    found = {
        name: Perplexity(tuple(text["nll"]), text["tokens"], text["predicted"])
        for name, text in data["perplexity"].items()
    }
    tasks = ZeroShot(**data["zero_shot"]) if data["zero_shot"] else None
    return Evaluation(found, data["continuations"], tasks)
