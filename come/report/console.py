"""Prints the summary table of a job to the console."""

from __future__ import annotations

from pathlib import Path

from come.records import DepthResult, Result
from come.report.numbers import duration, interval, megabytes, title

_WIDTH = 150  # characters, if the output is not a terminal
COLUMNS = (
    "layers",
    "parameters",
    "perplexity",
    "x dense",
    "zero-shot",
    "prompt tok/s",
    "generate tok/s",
    "compression",
)


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """The table's rows, one per model, as text; the columns are `COLUMNS`."""
    rows = [[*_row(depth), "-"] for depth in result["depths"]]
    if result["distillation"]:
        for row, depth in zip(rows[1:], result["depths"][1:], strict=True):
            row[0] += f" {depth['stage']}"
    cost = result["compression"]
    rows[-1][-1] = f"{duration(cost['seconds'])}, {megabytes(cost['peak_bytes'])}"
    return [tuple(row) for row in rows]


def summary_lines(result: Result) -> list[str]:
    """Describes the data behind the numbers, the distillation, and the cost of the compression."""
    compression, calibration = result["compression"], result["calibration"]
    lines = []
    first = result["depths"][0]["perplexity"]
    if first:
        lines.append(
            f"perplexity [95% interval over windows]: {first['tokens']} tokens in "
            f"{first['windows']} windows of {result['eval_source']}"
        )
    if calibration:
        lines.append(
            f"calibration: {calibration['tokens']} tokens in {calibration['windows']} windows of "
            f"{calibration['source']} ({calibration['corpus_tokens']} in hand)"
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
    if any(depth["speed"] for depth in result["depths"]):
        turns = ", dense and merged model in turn" if len(result["depths"]) > 1 else ""
        lines.append(f"speed: median{turns}, in this run")
    resumed = compression["resumed_at"]
    lines.append(
        "compression: seconds, and peak memory above the level before loading "
        f"({megabytes(compression['weight_bytes'])} of weights, "
        f"{megabytes(compression['boundary_bytes'])} of boundary states)"
        + (f", resumed after {resumed} merges" if resumed else "")
    )
    return lines


def show(result: Result, folder: Path) -> None:
    """Prints the table, the summary lines and the job folder."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(title=title(result))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)
    for line in summary_lines(result):
        console.print(line, soft_wrap=True)
    console.print(f"model and report: {folder}", soft_wrap=True, markup=False)


def _row(depth: DepthResult) -> tuple[str, ...]:
    parameters = f"{depth['parameters'] / 1e6:.1f} M"
    if depth["sparsity"]:
        parameters += f" (-{depth['sparsity']:.1%})"
    quality, ratio, tasks, prompt, generation = "-", "-", "-", "-", "-"
    if found := depth["perplexity"]:
        quality = interval(found["value"], found["low"], found["high"], 2)
        if depth["folder"]:
            ratio = interval(found["ratio"], found["ratio_low"], found["ratio_high"], 3)
    if zero_shot := depth["zero_shot"]:
        tasks = f"{zero_shot['average']:.1%}"
        if depth["folder"]:
            tasks += f" ({zero_shot['retention']:.1%})"
    if speed := depth["speed"]:
        prompt, generation = f"{speed['prompt']:.0f}", f"{speed['generation']:.1f}"
        if depth["folder"]:
            prompt += f" (x {speed['prompt_ratio']:.2f})"
            generation += f" (x {speed['generation_ratio']:.2f})"
    return (str(depth["layers"]), parameters, quality, ratio, tasks, prompt, generation)
