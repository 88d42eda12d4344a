"""The table of perplexity, agreement, accuracy and generation, from the committed results.

    python experiments/generation/table.py > experiments/generation/table.md

Reads results.jsonl (SmolLM2) and gemma.jsonl, and runs no model. Differences from the dense model
have a star where their 95% interval leaves out zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = {"SmolLM2": "results.jsonl", "Gemma": "gemma.jsonl"}
COLUMNS = {
    "perplexity": "x dense",
    "agreement": "agreement",
    "zero_shot": "zero-shot",
    "generation": "generation",
    "generation/word_problems": "word problems",
    "generation/arc_easy_open": "short answers",
    "generation/formats": "formats",
}


def cell(metric: dict[str, Any]) -> str:
    """The ratio of a perplexity, or another metric's value and difference from the dense model."""
    relative = metric["relative"]
    if metric["comparison"] == "ratio":
        return f"{relative['value']:.3f} [{relative['low']:.3f}, {relative['high']:.3f}]"
    star = "" if relative["low"] <= 0 <= relative["high"] else "*"
    return f"{metric['value']:.3f} ({relative['value']:+.3f}{star})"


def main() -> None:
    lines = [["", "layers", *COLUMNS.values()], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    for model, file in ROWS.items():
        rows = (Path(__file__).parent / file).read_text()
        jobs = [json.loads(line) for line in rows.splitlines()]
        dense = jobs[0]["depths"][0]
        own = (f"{dense['metrics'][name]['value']:.3f}" for name in list(COLUMNS)[1:])
        lines.append([f"{model}, dense", str(dense["layers"]), "1.000", *own])
        for job in jobs:
            name, last = job["overrides"]["from_run"].rsplit("/", 1)[0], job["depths"][-1]
            cells = (cell(last["metrics"][key]) for key in COLUMNS)
            lines.append([name, str(last["layers"]), *cells])
    print("".join(f"| {' | '.join(line)} |\n" for line in lines), end="")


if __name__ == "__main__":
    main()
