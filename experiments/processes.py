"""Speedup of two processes over one: `python experiments/processes.py --target 24`.

Alternates the benchmark in one process and in two, with one thread each. All options except
`--turns` are passed to `bench.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COUNT = 2


def run_bench(count: int, words: list[str]) -> dict[str, Any]:
    """Runs bench.py in `count` processes with one thread each; returns its JSON."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    bench = Path(__file__).with_name("bench.py")
    command = [sys.executable, *(launch if count > 1 else []), str(bench), *words, "--json"]
    ran = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    arguments, words = parser.parse_known_args()
    speedups = []
    for turn in range(arguments.turns):
        one, several = (run_bench(count, words) for count in (1, COUNT))
        assert one["spans"] == several["spans"], "the plans differ"
        speedups.append(one["seconds"] / several["seconds"])
        print(
            f"turn {turn + 1}: {one['layers']} to {one['target']} layers, {one['tokens']} tokens: "
            f"{one['seconds']:.1f} s = {one['ratio']:.2f} forward passes in one process, "
            f"{several['seconds']:.1f} s in {COUNT}: x {speedups[-1]:.2f}; "
            f"layer passes {one['layer_passes']} and {several['layer_passes']}",
            flush=True,
        )
    print(f"median x {statistics.median(speedups):.2f} (target: at least 1.6)")


if __name__ == "__main__":
    main()
