"""The table of healing on text from the model, from the committed results.

    python experiments/healing/table.py > experiments/healing/table.md

Reads results.jsonl and runs no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "results.jsonl"
HEADER = "model | layers | text | trained on | minutes | validation KL | x dense before | after"


def ratio(depth: dict[str, Any]) -> str:
    """Perplexity over that of the dense model, with its 95% interval."""
    found = depth["metrics"]["perplexity"]["relative"]
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def row(job: dict[str, Any]) -> list[str]:
    """The cells of a job."""
    words, trained = job["overrides"], job["distillation"]
    first, last = trained["validation"][0], trained["validation"][-1]
    merged, healed = job["depths"][-2:]
    return [
        words["from_run"],
        str(healed["layers"]),
        "dev" if words["eval.perplexity.text_range"] == "[0.6,0.8]" else "test",
        f"{trained['tokens']:,}",
        f"{trained['seconds'] / 60:.1f}",
        f"{first['logits']:.3f} -> {last['logits']:.3f}" if "logits" in first else "",
        ratio(merged),
        ratio(healed),
    ]


def main() -> None:
    jobs = [json.loads(line) for line in ROWS.read_text().splitlines()]
    columns = HEADER.split(" | ")
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *map(row, jobs)]
    print("".join(f"| {' | '.join(line)} |\n" for line in lines), end="")


if __name__ == "__main__":
    main()
