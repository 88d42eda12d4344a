"""The picture and table of the README: come_plus and other methods, from the committed results.

    python experiments/beyond/frontier.py

Same model (SmolLM2-135M-Instruct, expanded from 4-bit weights), calibration text, 32768 calibration
tokens, and evaluation windows. Reads candidate_sets/results.jsonl, tokens_32768/results.jsonl and,
for ShortGPT (first draw, 27 and 24 layers), zero_shot.jsonl; runs no model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from come.evaluate.base import Metric, Relative
from come.files import write_text
from come.report.grid_figure import draw_grid
from come.report.records import PARAMETERS, ModelRecord, model_records
from come.report.tables import depth_table

HERE = Path(__file__).parent
TEXT = "wikitext2_valid.txt"
TITLE = "SmolLM2-135M-Instruct from 4-bit weights, 32768 calibration tokens, WikiText-2"
CUT = 2.5  # ReplaceMe at 21 layers is at 23 x dense
NAMES = {
    ("candidate_sets", None): "come_plus",
    ("tokens_32768", "replaceme"): "ReplaceMe",
    ("tokens_32768", "shortgpt"): "drops with the same refit (ShortGPT's choice)",
}
NOTE = f"""
Perplexity, its ratio to the dense model's, and [lowest, highest] of three draws; of ShortGPT one
draw, with the 95% interval. The lowest ratio is bold.
{TITLE}.
Made by `python experiments/beyond/frontier.py`.
"""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main_records() -> Iterator[ModelRecord]:
    """The models of all jobs that are calibrated on TEXT and named in NAMES."""
    for (folder, merge), name in NAMES.items():
        for row in read(HERE / folder / "results.jsonl"):
            overrides = row["overrides"]
            if overrides.get("merge") == merge and overrides.get("calibration.path") == TEXT:
                for record in model_records(row, [], PARAMETERS):
                    yield replace(record, line=name, metrics={"perplexity": record.perplexity})


def shortgpt(dense: dict[str, Metric]) -> Iterator[ModelRecord]:
    """ShortGPT without a refit, which was measured beside zero-shot accuracy."""
    for row in read(HERE / "zero_shot.jsonl"):
        if row["method"] == "shortgpt":
            found = row["perplexity"]
            ratio = Relative(found["ratio"], found["ratio_low"], found["ratio_high"])
            metric = Metric(found["value"], found["low"], found["high"], relative=ratio)
            yield ModelRecord(
                "ShortGPT", str(row["parameters"]), row["layers"], row["parameters"], "",
                {"perplexity": metric}, dense,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both files")
    out = parser.parse_args().out
    found = list(main_records())
    found += shortgpt(found[0].dense)
    write_text(out / "frontier.md", depth_table(found, PARAMETERS).markdown() + NOTE)
    draw_grid(found, out / "frontier.png", PARAMETERS, TITLE, cut=CUT)


if __name__ == "__main__":
    main()
