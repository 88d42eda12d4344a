"""The dense model's evaluation, measured once for all jobs that share model and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.evaluation.continuations import PROMPTS, continuations
from come.evaluation.perplexity import Perplexity, perplexity
from come.evaluation.zero_shot import TaskSet, ZeroShot, zero_shot
from come.files import cache_folder, write_text
from come.text.windows import TokenWindows


@dataclass(frozen=True)
class Evaluation:
    """What is measured of one model alone.

    Attributes:
        perplexity: on the held-out windows; None where it was not asked for.
        continuations: of the report's prompts, in order.
        zero_shot: on the tasks; None where there are none.
    """

    perplexity: Perplexity | None
    continuations: list[str]
    zero_shot: ZeroShot | None = None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: TokenWindows | None,
    tasks: TaskSet | None = None,
    *,
    batch_tokens: int,
    new_tokens: int,
) -> Evaluation:
    """Perplexity on `windows` and the tasks, if any, and continuations of `new_tokens` tokens."""
    return Evaluation(
        perplexity(model, windows.windows, batch_tokens=batch_tokens) if windows else None,
        continuations(model, tokenizer, new_tokens=new_tokens) if new_tokens else [],
        zero_shot(model, tokenizer, tasks) if tasks else None,
    )


def evaluate_dense(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    windows: TokenWindows | None,
    tasks: TaskSet | None = None,
    *,
    fingerprint: str,
    dtype: torch.dtype,
    device: torch.device,
    batch_tokens: int,
    new_tokens: int,
) -> Evaluation:
    """`evaluate` of the dense model, from the cache where it has been measured before.

    Args:
        load: loads the dense model; called only if something must be measured.
        tokenizer: its tokenizer.
        windows: held-out windows.
        tasks: zero-shot tasks.
        fingerprint: of the dense model's files.
        dtype: dtype that it runs in.
        device: device that it runs on.
        batch_tokens: tokens of one forward pass.
        new_tokens: tokens of a continuation.
    """
    if windows is None and not new_tokens and tasks is None:
        return Evaluation(None, [])
    key = json.dumps(
        [
            fingerprint,
            str(dtype),
            windows.hash if windows else None,
            [PROMPTS, new_tokens],
            device.type,
            [torch.__version__, transformers.__version__],
            [tasks.identity, tasks.batch_size] if tasks else None,
        ]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / "evaluations" / f"{name}.json"
    if path.is_file():
        data = json.loads(path.read_text())
        found = data["perplexity"]
        if found:
            found = Perplexity(tuple(found["nll"]), found["tokens"], found["predicted"])
        tasks_found = ZeroShot(**data["zero_shot"]) if data["zero_shot"] else None
        return Evaluation(found, data["continuations"], tasks_found)
    evaluation = evaluate(
        load(), tokenizer, windows, tasks, batch_tokens=batch_tokens, new_tokens=new_tokens
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found = evaluation.perplexity
    data = {
        "perplexity": found
        and {"nll": found.nll, "tokens": found.tokens, "predicted": found.predicted},
        "continuations": evaluation.continuations,
        "zero_shot": asdict(evaluation.zero_shot) if evaluation.zero_shot else None,
    }
    write_text(path, json.dumps(data))
    return evaluation
