"""The dense model's evaluation, measured once for all jobs that share model and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from come.evaluation.continuations import PROMPTS, continuations
from come.evaluation.perplexity import Perplexity, perplexity
from come.files import cache_folder, write_text
from come.text.windows import TokenWindows


@dataclass(frozen=True)
class Evaluation:
    """What is measured of one model alone.

    Attributes:
        perplexity: on the held-out windows; None where it was not asked for.
        continuations: of the report's prompts, in order.
    """

    perplexity: Perplexity | None
    continuations: list[str]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: TokenWindows | None,
    *,
    batch_tokens: int,
    new_tokens: int,
) -> Evaluation:
    """Perplexity on `windows`, if there are any, and continuations of `new_tokens` tokens."""
    return Evaluation(
        perplexity(model, windows.windows, batch_tokens=batch_tokens) if windows else None,
        continuations(model, tokenizer, new_tokens=new_tokens) if new_tokens else [],
    )


def evaluate_dense(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    windows: TokenWindows | None,
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
        fingerprint: of the dense model's files.
        dtype: dtype that it runs in.
        device: device that it runs on.
        batch_tokens: tokens of one forward pass.
        new_tokens: tokens of a continuation.
    """
    if windows is None and not new_tokens:
        return Evaluation(None, [])
    key = json.dumps(
        [
            fingerprint,
            str(dtype),
            windows.hash if windows else None,
            [PROMPTS, new_tokens],
            device.type,
            [torch.__version__, transformers.__version__],
        ]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / "evaluations" / f"{name}.json"
    if path.is_file():
        data = json.loads(path.read_text())
        found = data["perplexity"]
        if found:
            found = Perplexity(tuple(found["nll"]), found["tokens"], found["predicted"])
        return Evaluation(found, data["continuations"])
    evaluation = evaluate(
        load(), tokenizer, windows, batch_tokens=batch_tokens, new_tokens=new_tokens
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found = evaluation.perplexity
    data = {
        "perplexity": found
        and {"nll": found.nll, "tokens": found.tokens, "predicted": found.predicted},
        "continuations": evaluation.continuations,
    }
    write_text(path, json.dumps(data))
    return evaluation
