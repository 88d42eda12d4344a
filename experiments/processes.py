"""How much faster several processes are: `python experiments/processes.py --target 24`.

Runs the bench in one process and in several, each with one thread, in turns. All options go to
`bench.py`. On a machine with N cores, N processes of one thread use it whole.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COUNT = 2
TURNS = 2


def measured(count: int, words: list[str]) -> dict[str, Any]:
    """What the bench measures in `count` processes of one thread each."""
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
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    speedups = []
    for turn in range(TURNS):
        one, several = (measured(count, sys.argv[1:]) for count in (1, COUNT))
        assert one["spans"] == several["spans"], "the plans differ"
        speedups.append(one["seconds"] / several["seconds"])
        print(
            f"turn {turn + 1}: {one['layers']} to {one['target']} layers, {one['tokens']} tokens: "
            f"{one['seconds']:.1f} s in one process, {several['seconds']:.1f} s in {COUNT}: "
            f"x {speedups[-1]:.2f}; layer passes {one['layer_passes']} and "
            f"{several['layer_passes']}",
            flush=True,
        )
    print(f"median x {statistics.median(speedups):.2f} (wanted: at least 1.6)")


if __name__ == "__main__":
    main()
