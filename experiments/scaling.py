"""How the cost of the default method grows with layers and with tokens.

`python experiments/scaling.py` measures several numbers of layers and of tokens (random weights of
SmolLM2's layer shape; two layers are removed) and fits exponents. With `--arithmetic` it prints
the estimate for whole models of 7B and 70B parameters, which needs no weights.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from bench import COME_PLUS, SHAPES, random_config

from come.job.estimate import Cost, compression_cost
from come.models.shape import ModelShape
from come.report.numbers import duration, megabytes

REMOVED = 2  # layers
SEQ_LEN = 256
RATE = 1.9e13
"""Operations a second of the measured run: 2.1e15 in 111 s on an H200 (experiments/gpu)."""


class Measurement(NamedTuple):
    """A measured compression."""

    layers: int
    tokens: int
    seconds: float
    forward_seconds: float
    peak_bytes: int


def measure(shape: str, layers: int, tokens: int) -> Measurement:
    """Time and memory of the default method on random weights, in a new process.

    In the same process, memory kept from an earlier run would hide the needs of a later one.
    """
    bench = Path(__file__).with_name("bench.py")
    words = f"--shape {shape} --layers {layers} --target {layers - REMOVED} --tokens {tokens}"
    ran = subprocess.run(
        [sys.executable, str(bench), *words.split(), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    names = ("seconds", "forward_seconds", "peak_bytes")
    return Measurement(layers, tokens, *(found[name] for name in names))


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of log(cost) over log(size), by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    pairs = list(zip(x, y, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in pairs) / sum((a - mean_x) ** 2 for a in x)


def arithmetic(shape: str, *, removed: int, tokens: int) -> Cost:
    """The estimate for a whole model with its layers on disk, on a CUDA device."""
    from transformers import MistralForCausalLM

    config = random_config(shape)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    return compression_cost(
        ModelShape.of(model, torch.bfloat16),
        num_samples=tokens // SEQ_LEN,
        seq_len=SEQ_LEN,
        target=config.num_hidden_layers - removed,
        method=COME_PLUS,
        store="memory",
        device="cuda",
        weights="disk",
    )


def _series(shape: str, name: str, measured: list[Measurement]) -> list[str]:
    """Lines for the measurements of one series, and the exponents of time and memory."""
    sizes = [getattr(m, name) for m in measured]
    lines = [
        f"| {m.layers} | {m.tokens} | {m.seconds:.1f} | {m.seconds / m.forward_seconds:.1f} "
        f"| {megabytes(m.peak_bytes)} |"
        for m in measured
    ]
    time = exponent(sizes, [m.seconds for m in measured])
    memory = exponent(sizes, [float(m.peak_bytes) for m in measured])
    return [*lines, f"exponent over {name} ({shape}): time {time:.2f}, memory {memory:.2f}"]


def _estimates() -> list[str]:
    """A table of the estimates for whole models."""
    lines = [
        "| shape | layers | tokens | device memory | main memory | with store=disk | files "
        "| operations | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, removed in (("mistral7b", 4), ("llama70b", 10)):
        count = SHAPES[shape]["num_hidden_layers"]
        for tokens in (8192, 32768):
            cost = arithmetic(shape, removed=removed, tokens=tokens)
            device = cost.weight_bytes + cost.step_bytes
            files = cost.boundary_bytes + cost.trial_bytes
            operations = cost.work.forward + cost.work.single + cost.work.double
            lines.append(
                f"| {shape} | {count} to {count - removed} | {tokens} | {megabytes(device)} "
                f"| {megabytes(cost.boundary_bytes + cost.validation_bytes)} "
                f"| {megabytes(cost.validation_bytes)} | {megabytes(files)} "
                f"| {operations:.1e} | {duration(operations / RATE)} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--arithmetic", action="store_true")
    arguments = parser.parse_args()
    if arguments.arithmetic:
        print("\n".join(_estimates()))
        return
    print("| layers | tokens | s | forward passes | memory above the weights |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    layers, tokens = sorted(arguments.layers), sorted(arguments.tokens)
    middle = (layers[len(layers) // 2], tokens[len(tokens) // 2])
    measured = {middle: measure(arguments.shape, *middle)}
    for name, sizes in (
        ("layers", [(count, middle[1]) for count in layers]),
        ("tokens", [(middle[0], count) for count in tokens]),
    ):
        for size in sizes:
            if size not in measured:
                measured[size] = measure(arguments.shape, *size)
        print(
            "\n".join(_series(arguments.shape, name, [measured[size] for size in sizes])),
            flush=True,
        )


if __name__ == "__main__":
    main()
