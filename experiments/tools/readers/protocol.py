"""What the driver and a reader script exchange. Needs numpy, and torch only in `with_transformers`.

`python readers/use_TOOL.py REQUEST` reads a JSON file with the fields of `Request` and appends one
JSON line to its file `out` for every form in which the tool ran the model (`Request.report`).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """One model that a tool reads.

    Attributes:
        model: name of the model.
        folder: its folder.
        work: an empty folder for what the tool writes.
        out: the file of JSON lines for the answer.
        prompts: texts to continue greedily.
        prompt_ids: their token ids in transformers.
        texts: texts whose perplexity is measured.
        windows: their token ids, each with the token that the model expects before a text.
        new_tokens: number of tokens in a continuation.
        package: the package whose version the table names.
    """

    model: str
    folder: str
    work: str
    out: str
    prompts: list[str]
    prompt_ids: list[list[int]]
    texts: list[str]
    windows: list[list[int]]
    new_tokens: int
    package: str

    @classmethod
    def read(cls) -> Request:
        """The request whose file is the first argument."""
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    def report(
        self,
        form: str,
        *,
        tokens: Sequence[Sequence[int]] | None = None,
        continuations: Sequence[str] | None = None,
        perplexity: float | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        expected: dict[str, Any] | None = None,
        note: str = "",
    ) -> None:
        """Appends one row.

        Args:
            form: numeric format of the weights in the tool: a key of `table.FORMS`.
            tokens: greedy token ids of every prompt.
            continuations: greedy text of every prompt, from tools that return no ids.
            perplexity: over `windows`, or the same texts.
            prompt_ids: the prompts in the tool's own tokenizer.
            expected: `tokens` and `perplexity` to compare with, in place of the dense reference.
            note: for the table.
        """
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        row = {
            "form": form, "tokens": tokens, "continuations": continuations,
            "perplexity": perplexity, "prompt_ids": prompt_ids, "expected": expected,
            "note": note, "version": version,
        }  # fmt: skip
        with open(self.out, "a") as file:
            file.write(json.dumps(row, default=_plain) + "\n")


def write_request(request: Request, path: Path) -> None:
    """Writes a request for `Request.read`."""
    path.write_text(json.dumps(asdict(request)))


def perplexity(windows: Sequence[Sequence[int]], logits: Callable[[list[int]], Any]) -> float:
    """Perplexity: exp of the mean negative log-likelihood of all tokens but the first of a window.

    Args:
        windows: token ids.
        logits: from token ids to an array, [tokens, vocabulary].
    """
    import numpy as np

    total, count = 0.0, 0
    for ids in windows:
        rows = np.asarray(logits(list(ids)), dtype=np.float64)[: len(ids) - 1]
        largest = rows.max(axis=1)
        normaliser = np.log(np.exp(rows - largest[:, None]).sum(axis=1)) + largest
        total += float((normaliser - rows[np.arange(len(ids) - 1), ids[1:]]).sum())
        count += len(ids) - 1
    return math.exp(total / count)


def greedy(
    prompts: Sequence[Sequence[int]], new_tokens: int, logits: Callable[[list[int]], Any]
) -> list[list[int]]:
    """Greedy token ids from full forward passes, without a cache."""
    import numpy as np

    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(np.asarray(logits(ids))[-1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def with_transformers(model: Any, request: Request) -> dict[str, Any]:
    """Greedy tokens (with the cache) and perplexity of a model with transformers' interface."""
    import torch

    if isinstance(model, torch.nn.Module):
        model.eval()

    def logits(ids: list[int]) -> Any:
        given = torch.tensor([ids])
        return model(given, attention_mask=torch.ones_like(given)).logits[0].float().numpy()

    tokens = []
    with torch.no_grad():
        for prompt in request.prompt_ids:
            ids = torch.tensor([prompt])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.new_tokens,
                min_new_tokens=request.new_tokens,
                do_sample=False,
            )
            tokens.append(output[0, len(prompt) :].tolist())
        return {"tokens": tokens, "perplexity": perplexity(request.windows, logits)}


def load(folder: str | Path, **options: Any) -> Any:
    """The folder's model in float32, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"torch_dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tokenized(request: Request, folder: str | Path | None = None) -> list[list[int]]:
    """The prompts in the tokenizer that transformers reads from a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or request.folder)
    return [tokenizer(prompt)["input_ids"] for prompt in request.prompts]


def command(*words: str | Path, **environment: str) -> str:
    """Runs a command of the tool's environment; returns what it prints.

    Raises:
        RuntimeError: it failed; the message is the last lines that it printed.
    """
    import os

    beside = Path(sys.executable).parent / str(words[0])
    program = str(beside) if beside.exists() else str(words[0])
    shown = " ".join(map(str, words))
    print(f"$ {shown}", flush=True)
    done = subprocess.run(
        [program, *map(str, words[1:])],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{shown}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else float(value)
