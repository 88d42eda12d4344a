"""Recovery curves, and the table of memory and speed, from finished distillation jobs.

    python experiments/distill/curves.py runs/JOB runs/JOB ... --out experiments/distill

A curve shows the student's perplexity on held-out windows of the training text against training
tokens, relative to its first value. CoMe-mp never runs the whole student during training, so its
dashed line connects the final results of jobs of several lengths, measured on the evaluation text.
The table has the final evaluation of all jobs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from come.files import write_text

HEADER = (
    "| merge | method | loss | text | tokens | x dense, merged | x dense, distilled "
    "| trained parameters | weights | gradients | optimiser state | tokens/s |\n"
    "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", type=Path, nargs="+", help="folders of finished jobs")
    parser.add_argument("--out", type=Path, required=True, help="folder for both files")
    arguments = parser.parse_args()
    files = [file for job in arguments.jobs if (file := job / "result.json").is_file()]
    results = [json.loads(file.read_text()) for file in files]
    results = [result for result in results if result["distillation"]]
    write_text(arguments.out / "memory.md", HEADER + "".join(map(row, results)))
    draw(results, arguments.out / "curves.png")


def label(result: dict[str, Any]) -> list[str]:
    """Merge, method, loss where it can be chosen, and text where it is not the calibration text."""
    settings = result["settings"]["distill"]
    method, source = settings["method"], settings["source"]
    loss = settings["loss"] if method.startswith("come") else ""
    loss += " + logits" if loss and settings["logit_weight"] else ""
    return [result["method"], method, loss, "" if source == "calibration" else source]


def ratio(result: dict[str, Any], stage: str) -> float:
    """Perplexity relative to the dense model, from the final evaluation."""
    depth = next(d for d in result["depths"] if d["stage"] == stage)
    return depth["metrics"]["perplexity"]["relative"]["value"]


def row(result: dict[str, Any]) -> str:
    """The table row of a job."""
    training = result["distillation"]
    merged, healed = ratio(result, "merged"), ratio(result, "distilled")
    sizes = [training[f"{part}_bytes"] / 1e6 for part in ("weight", "gradient", "optimizer")]
    cells = [
        *label(result),
        f"{training['tokens']:,}",
        f"{merged:.2f}",
        f"{healed:.2f}",
        f"{training['trained_parameters'] / 1e6:.1f} M",
        *(f"{size:,.0f} MB" for size in sizes),
        f"{training['tokens_per_second']:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plots one line per job that logs the student's cross-entropy, one per label otherwise."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    ends: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        points = [v for v in result["distillation"]["validation"] if "nll" in v]
        if not points:
            healed = ratio(result, "distilled") / ratio(result, "merged")
            line = ends.setdefault(", ".join(filter(None, label(result))), [(0, 1)])
            line.append((result["distillation"]["tokens"] / 1000, healed))
            continue
        start = points[0]["nll"]
        axis.plot(
            [point["tokens"] / 1000 for point in points],
            [math.exp(point["nll"] - start) for point in points],
            marker="o", ms=3, lw=1.3,
            label=", ".join(filter(None, label(result))),
        )  # fmt: skip
    for name, line in ends.items():
        tokens, values = zip(*sorted(line), strict=True)
        axis.plot(tokens, values, "--x", label=f"{name} (evaluation text)", lw=1.3, color="black")
    axis.set_xlabel("training tokens, thousands")
    axis.set_ylabel("validation perplexity, over the merged model's")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
