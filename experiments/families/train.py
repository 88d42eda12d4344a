"""Trains a small model from scratch on Python's documentation: a MoE, Mamba-2, RWKV or post-norms.

    python experiments/families/train.py moe|mamba2|rwkv|post_norm

Prints the folder of the checkpoint as the only line of standard output, so that
`model.path=$(python experiments/families/train.py moe)` works. The folder holds the model, its own
tokenizer, the training text `train.txt`, the held-out text `test.txt`, and `train.json` with the
settings, the tokens and time of the training, and the perplexity. It is in the cache ($COME_CACHE);
a second call with the same settings only prints it.

With the same settings and number of threads, the same model is trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from documentation import Document, Texts, documents, split, train_tokenizer
from filelock import FileLock
from small_models import LAYERS, MODELS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from wkv import all_tokens_at_once

from come.files import cache_folder, new_folder

WARM_UP = 0.05  # share of the training
LOWEST = 0.05  # last learning rate, relative to the highest
WEIGHT_DECAY = 0.1
RECORD = "train.json"  # the last file of a checkpoint
REPORT_SECONDS = 15
TRAIN_MEASURED = 20_000  # tokens of the training text whose perplexity is recorded


@dataclass(frozen=True)
class Settings:
    """What decides which model is trained; the cache is keyed by it."""

    family: str
    tokens: int
    seed: int
    layers: int
    config: dict[str, Any]
    seq_len: int
    batch: int
    learning_rate: float
    bfloat16: bool
    python: str  # its version, which decides the text

    @property
    def folder(self) -> Path:
        """Where the checkpoint is kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / "models" / f"small-{self.family}-{digest[:8]}"


def settings(
    family: str,
    *,
    tokens: int | None = None,
    seed: int = 0,
    layers: int = LAYERS,
) -> Settings:
    """The settings of a family's training."""
    small = MODELS[family]
    return Settings(
        family=family,
        tokens=tokens or small.tokens,
        seed=seed,
        layers=layers,
        config=small.arguments(layers),
        seq_len=small.seq_len,
        batch=small.batch,
        learning_rate=small.learning_rate,
        bfloat16=small.bfloat16,
        python=platform.python_version(),
    )


def checkpoint(chosen: Settings, titled: Iterable[Document] | None = None) -> Path:
    """The folder of the trained model, trained on first use.

    Args:
        chosen: the settings.
        titled: documents in place of Python's documentation.
    """
    folder = chosen.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / RECORD).is_file():
            with new_folder(folder, ["config.json"]) as partial:
                _write(partial, chosen, split(documents() if titled is None else titled))
    return folder


def _write(folder: Path, chosen: Settings, texts: Texts) -> None:
    """Trains the tokenizer and the model, and writes all files."""
    small = MODELS[chosen.family]
    tokenizer = train_tokenizer(texts.train, chosen.config["vocab_size"])
    train, test = (torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
    say(f"{chosen.family}: {len(train)} tokens to train on, {len(test)} held out")
    torch.manual_seed(chosen.seed)
    config = AutoConfig.for_model(small.model_type, **chosen.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with all_tokens_at_once():
        record = train_model(model, train, chosen, dict(small.forward))
        for name, ids in (("train", train[:TRAIN_MEASURED]), ("test", test)):
            record[f"{name}_perplexity"] = perplexity(model, ids, chosen.seq_len)
    say(f"{chosen.family}: perplexity {record['test_perplexity']:.2f} on held-out documents")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in texts._asdict().items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    record |= {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "train_tokens": len(train),
        "test_tokens": len(test),
        "text": texts.hash,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(chosen),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def train_model(
    model: PreTrainedModel, ids: Tensor, chosen: Settings, forward: dict[str, Any]
) -> dict[str, Any]:
    """Trains with AdamW, a warm-up and a cosine; returns tokens, seconds and the last loss."""
    decayed, plain = parameter_groups(model)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=chosen.learning_rate,
        betas=(0.9, 0.95),
    )
    model.train()
    begin = reported = time.monotonic()
    done, mean = 0, math.nan
    for windows in batches(ids, chosen):
        progress = done / chosen.tokens
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * rate(progress)
        with torch.autocast("cpu", torch.bfloat16) if chosen.bfloat16 else nullcontext():
            output = model(windows, labels=windows, use_cache=False, **forward)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += windows.numel()
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} after {done} tokens")
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            report(chosen, done, mean, reported - begin)
    return {"tokens": done, "seconds": round(time.monotonic() - begin, 1), "loss": mean}


def parameter_groups(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices, which decay, and all other parameters."""
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for weight in model.parameters():
        groups[sum(size > 1 for size in weight.shape) < 2].append(weight)
    return groups


def batches(ids: Tensor, chosen: Settings) -> Iterator[Tensor]:
    """Windows in a random order, again and again, each time cut at another offset."""
    generator = torch.Generator().manual_seed(chosen.seed)
    while True:
        offset = int(torch.randint(chosen.seq_len, (), generator=generator))
        usable = (len(ids) - offset) // chosen.seq_len * chosen.seq_len
        windows = ids[offset : offset + usable].view(-1, chosen.seq_len)
        if len(windows) < chosen.batch:
            raise SystemExit(f"{len(ids)} tokens do not fill a step of {chosen.batch} windows")
        order = torch.randperm(len(windows), generator=generator)
        for chunk in order.split(chosen.batch):
            if len(chunk) == chosen.batch:
                yield windows[chunk]


def rate(progress: float) -> float:
    """The learning rate at a fraction of the training, relative to the highest."""
    if progress < WARM_UP:
        return max(progress, 0.02 * WARM_UP) / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return LOWEST + (1 - LOWEST) * cosine


def report(chosen: Settings, done: int, loss: float, seconds: float) -> None:
    """Prints the progress and the remaining time."""
    left = seconds * (chosen.tokens - done) / done
    say(
        f"{chosen.family}: {done} of {chosen.tokens} tokens, loss {loss:.3f}, "
        f"{done / seconds:.0f} tokens/s, {max(left, 0) / 60:.1f} min left"
    )


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, seq_len: int, batch: int = 16) -> float:
    """The exponential of the mean loss per predicted token, in consecutive windows, in float32."""
    model.eval()
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    total = 0.0
    for chunk in windows.split(batch):
        logits = model(chunk, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total += losses.item()
    return math.exp(total / (len(windows) * (seq_len - 1)))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=MODELS)
    parser.add_argument("--tokens", type=int, help="token budget; by default that of the family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = vars(parser.parse_args())
    print(checkpoint(settings(arguments.pop("family"), **arguments)))


if __name__ == "__main__":
    main()
