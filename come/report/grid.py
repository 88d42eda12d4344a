"""Collects the `result.json` of a sweep's jobs, and writes its tables and figure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from come.files import DAMAGED, LISTING, RESULT, read_again, read_object, write_text
from come.renamed import current_key, current_keys
from come.report.grid_figure import draw_grid
from come.report.records import (
    PARAMETERS,
    ModelRecord,
    Row,
    check_depths,
    label,
    model_records,
    varying_keys,
)
from come.report.tables import depth_table, long_table, metric_table


def read_grid(folder: Path, also: Sequence[Path] = ()) -> tuple[list[Row], list[dict[str, str]]]:
    """Reads the results of a sweep's finished jobs.

    Args:
        folder: the sweep's folder, with `jobs.jsonl`. If a job is listed more than once, its last
            entry is used.
        also: `results.jsonl` files of the same sweep, written elsewhere. A job in `folder` replaces
            the job with the same overrides there.

    Returns:
        The finished jobs, and the overrides of the unfinished jobs.
    """
    listing = folder / LISTING
    jobs: dict[str, tuple[dict[str, str], Path]] = {}
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        overrides = {}
        try:
            entry = json.loads(line)
            for item in entry["overrides"]:
                key, _, value = item.lstrip("+").partition("=")
                overrides[key] = value
            jobs[json.dumps(overrides, sort_keys=True)] = overrides, Path(entry["folder"])
        except DAMAGED:
            continue  # incomplete because the job was killed; a rerun lists the job again
    short = _short_paths([overrides for overrides, _ in jobs.values()])
    rows, missing, seen = [], [], []
    for overrides, job in jobs.values():
        shown = {key: short.get(value, value) for key, value in overrides.items()}
        seen.append(current_keys(shown))
        row = read_again(job / RESULT, lambda path: _row(shown, read_object(path)))  # noqa: B023
        if row is None:
            missing.append(shown)
        else:
            rows.append(row)
    for path in also:
        others = [json.loads(line) for line in path.read_text().splitlines()]
        rows += [row for row in others if current_keys(row["overrides"]) not in seen]
    return rows, missing


def write_grid(
    folder: Path,
    rows: Sequence[Row],
    missing: Sequence[Mapping[str, str]] = (),
    *,
    x: str = PARAMETERS,
    title: str = "",
) -> str:
    """Writes `table.md`, `table.tex`, `table.csv`, `figure.png` and `results.jsonl`.

    In the perplexity and accuracy tables, jobs that differ only in a seed share a row: means over
    the seeds, for perplexity ratios also [lowest, highest]. In the CSV, every model has its own
    lines. Former keys of settings have their current names everywhere but in `results.jsonl`.

    Args:
        folder: the output folder.
        rows: the finished jobs.
        missing: overrides of the unfinished jobs.
        x: horizontal axis of the figure: "parameters", or an override key that varies over jobs.
        title: title of the figure.

    Returns:
        The tables with their notes, as Markdown.
    """
    x, missing = current_key(x), [current_keys(job) for job in missing]
    varying = varying_keys([*(row["overrides"] for row in rows), *missing])
    found = [model for row in rows for model in model_records(row, varying, x)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tables, notes = [], []
    measured = [model for model in found if model.perplexity is not None]
    if measured:
        tables.append(depth_table(measured, x))
        notes.append(_note(measured))
        draw_grid(measured, folder / "figure.png", x, title)
    names = dict.fromkeys(name.partition("/")[0] for model in found for name in model.metrics)
    for name in names:
        if name != "perplexity":
            tables.append(metric_table(found, name, x))
            notes.append(f"{_COMPARED}\n")
    notes.append(_shared(rows, varying))
    if missing:
        notes.append(f"Not finished: {'; '.join(label(job, varying) for job in missing)}.\n")
    said = dict.fromkeys(filter(None, notes))  # tables can have the same note
    text = "\n".join([*(table.markdown() for table in tables), *said])
    write_text(folder / "table.md", text)
    write_text(folder / "table.tex", "\n".join(table.latex() for table in tables))
    write_text(folder / "table.csv", long_table(found, x) if found else "")
    return text


_COMPARED = """Values are followed by the ratio to the dense model, or the difference to it with a
star where it is significant: the 95% interval (paired bootstrap) leaves out zero, and McNemar's
test agrees."""


def _note(models: Sequence[ModelRecord]) -> str:
    dense = {model.text for model in models}
    texts = "".join(f"- {value:.2f}, {data}\n" for value, data in sorted(dense))
    return (
        "Perplexity, followed by its ratio to the dense model's, with the 95% interval; of several"
        "\nseeds means, with [lowest, highest]. The lowest ratio is bold. Dense:\n\n" + texts
    )


def _shared(rows: Sequence[Row], varying: Sequence[str]) -> str:
    """Sentence with the overrides that all jobs share; empty if there are none."""
    first = current_keys(rows[0]["overrides"]) if rows else {}
    shared = [f"{k}={v}" for k, v in first.items() if k not in (*varying, "experiment")]
    if not shared:
        return ""
    return textwrap.fill(f"All jobs: {', '.join(shared)}.", 100, break_long_words=False) + "\n"


def _numbers(metric: Mapping[str, Any]) -> dict[str, Any]:
    """A metric without samples, and without the texts and token ids of continuations."""
    details = {k: v for k, v in metric["details"].items() if k not in ("texts", "ids")}
    return {**metric, "samples": [], "details": details}


def _short_paths(jobs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Maps each path to its file name, if no other path of the sweep has the same file name."""
    paths = sorted({v for job in jobs for k, v in job.items() if k.endswith("path")})
    names = [Path(path).name for path in paths]
    return {path: name for path, name in zip(paths, names, strict=True) if names.count(name) == 1}


def _row(overrides: dict[str, str], result: Mapping[str, Any]) -> Row:
    """The part of a result for tables and figure, without per-window and per-document data."""
    check_depths(result["depths"])
    if any("parameters" not in depth for depth in result["depths"]):
        raise ValueError("a model has no number of parameters")
    depths = [
        {key: depth[key] for key in ("layers", "parameters", "sparsity", "stage") if key in depth}
        | {"metrics": {name: _numbers(metric) for name, metric in depth["metrics"].items()}}
        for depth in result["depths"]
    ]
    return {
        "job": result["job"],
        "method": result["method"],
        "overrides": overrides,
        "depths": depths,
        "compression": {
            k: result["compression"][k] for k in ("seconds", "layer_passes", "peak_bytes")
        },
        "merge_history": result["merge_history"],
    } | ({"distillation": result["distillation"]} if result.get("distillation") else {})
