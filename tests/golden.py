"""Golden values of every method on every pico family: python -m tests.golden [--write].

A refactoring must not change them. Plans are compared exactly, and the sum of absolute weights to 6
digits. `--exact FILE` also compares hashes of all weights, which are valid only on the machine that
wrote them. `torchrun --nproc_per_node 2 -m tests.golden` shares every case between two processes.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch

from come.merge.loop import compress
from come.stream.processes import SINGLE, Processes
from tests.conftest import FAMILIES, LAYERS, SEQ, VOCAB, WINDOWS, pico
from tests.disk import all_tensors, on_disk
from tests.methods import paper, recipe
from tests.test_methods import PARTS, RECIPES

FILE = Path(__file__).with_suffix(".json")


def digest(data):
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def values(family, method, weights="memory", processes=SINGLE):
    """The plan and the weights that a method gives for a pico model, in memory or on disk."""
    windows = torch.randint(3, VOCAB, (WINDOWS, SEQ), generator=torch.Generator().manual_seed(7))
    model = pico(family) if weights == "memory" else on_disk(pico(family))
    plan = compress(
        model, windows, method, target_layers=LAYERS - 2, progress=False, processes=processes
    )
    state = all_tensors(model)
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(state[name].contiguous().numpy().tobytes())
    return {
        "spans": [[step.first, step.last] for step in plan.steps],
        "shares": [[round(share, 6) for share in step.shares] for step in plan.steps],
        "kept": digest([dict(step.kept) for step in plan.steps]),
        "size": f"{sum(t.double().abs().sum().item() for t in state.values()):.6g}",
        "exact": hashed.hexdigest()[:16],
    }


def cases():
    """Yields name, family and method: recipes on every family, single parts on four."""
    for family in FAMILIES:
        for name in RECIPES:
            yield f"{family}/{name}", family, lambda name=name: recipe(name)
    for family in ("llama_gqa", "qwen3_gqa", "opt", "opt_nobias"):
        for parts in PARTS:
            label = ",".join(f"{k}={v}" for k, v in parts.items())
            yield f"{family}/{label}", family, lambda parts=parts: paper(**parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--exact", type=Path, help="hashes of all weights, written or compared")
    parser.add_argument("--weights", default="memory", choices=("memory", "disk"))
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    given, processes = arguments.weights, Processes.launched()
    found = {name: values(family, method(), given, processes) for name, family, method in cases()}
    if processes.rank:
        return False
    exact = {name: value.pop("exact") for name, value in found.items()}
    if arguments.write:
        lines = [f'"{name}": {json.dumps(value)}' for name, value in found.items()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if arguments.exact and arguments.write:
        arguments.exact.write_text(json.dumps(exact, indent=1))
    known = json.loads(FILE.read_text())
    wrong = [name for name in known if found.get(name) != known[name]]
    if arguments.exact:
        hashes = json.loads(arguments.exact.read_text())
        wrong += [f"{name} (weights)" for name in hashes if exact.get(name) != hashes[name]]
    print(f"{len(known)} cases, {len(wrong)} differ")
    print("\n".join(wrong[:40]))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
