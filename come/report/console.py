"""Prints the summary table of a job to the console."""

from __future__ import annotations

from pathlib import Path

from come.evaluate.base import Metric, read_metrics
from come.models.checkpoint import describe_source
from come.records import Result
from come.report.numbers import comparison, duration, heading, megabytes, relative, title, value
from come.report.tables import Table

_WIDTH = 120  # characters, if the output is not a terminal


def summary_table(result: Result) -> Table:
    """One row per model: its size, its headline metrics, and their comparison with dense."""
    metrics = [read_metrics(depth["metrics"]) for depth in result["depths"]]
    headlines = dict.fromkeys(
        name for found in metrics for name, metric in found.items() if metric.headline
    )
    head = ["layers", "parameters"]
    for name in headlines:
        first = next(found[name] for found in metrics if name in found)
        head += [heading(name, first), comparison(first)]
    rows = []
    for depth, found in zip(result["depths"], metrics, strict=True):
        stage = f" {depth['stage']}" if result["distillation"] and depth["folder"] else ""
        parameters = f"{depth['parameters'] / 1e6:.1f} M"
        if depth["sparsity"]:
            parameters += f" (-{depth['sparsity']:.1%})"
        row = [f"{depth['layers']}{stage}", parameters]
        for name in headlines:
            metric = found.get(name)
            row += [value(metric), relative(metric)] if metric else ["", ""]
        rows.append(row)
    return Table(head, rows, labels=0).without_empty_columns()


def summary_lines(result: Result) -> list[str]:
    """Describes the model, the evaluation and calibration data, the distillation and the cost."""
    compression, calibration = result["compression"], result["calibration"]
    source = describe_source(result["settings"]["model"]["path"])
    lines = [f"model: {source}"] if source else []
    models = [depth["metrics"] for depth in result["depths"]]
    for name, metric in models[0].items():
        same = all(own[name]["data"] == metric["data"] for own in models if name in own)
        if metric["headline"] and metric["data"] and same:
            lines.append(f"{heading(name, Metric.read(metric))}: {metric['data']}")
    if calibration:
        lines.append(
            f"calibration: {calibration['tokens']} tokens in {calibration['windows']} windows of "
            f"{calibration['source']} ({calibration['corpus_tokens']} available"
            + (
                f", without {calibration['removed_lines']} lines that the held-out text has too)"
                if calibration["removed_lines"]
                else ")"
            )
        )
    if training := result["distillation"]:
        lines.append(
            f"distillation: {training['method']}, {training['tokens']} tokens "
            f"({training['distinct_tokens']} different ones) of {training['source']}, "
            f"{training['trained_parameters'] / 1e6:.1f} M parameters trained, best at step "
            f"{training['best_step']} of {training['steps']}, {duration(training['seconds'])}, "
            f"{training['tokens_per_second']:.0f} tokens/s; weights "
            f"{megabytes(training['weight_bytes'])}, gradients "
            f"{megabytes(training['gradient_bytes'])}, optimiser "
            f"{megabytes(training['optimizer_bytes'])}"
        )
    resumed = compression["resumed_at"]
    lines.append(
        f"compression: {duration(compression['seconds'])}, "
        f"{megabytes(compression['peak_bytes'])} of memory above the level before loading "
        f"({megabytes(compression['weight_bytes'])} of weights, "
        f"{megabytes(compression['boundary_bytes'])} of boundary states)"
        + (f", resumed after {resumed} merges" if resumed else "")
    )
    return lines


def show(result: Result, folder: Path) -> None:
    """Prints the table, the summary lines and the job folder."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    summary = summary_table(result)
    table = RichTable(title=title(result))
    for column in summary.head:
        table.add_column(column, justify="right")
    for row in summary.rows:
        table.add_row(*row)
    console.print(table)
    for line in summary_lines(result):
        console.print(line, soft_wrap=True)
    console.print(f"model and report: {folder}", soft_wrap=True, markup=False)
