"""Writes `report.md` with its figures, and the model card of every saved model."""

from __future__ import annotations

from pathlib import Path

from come.evaluate.continuations import PROMPTS
from come.files import write_text
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.records import DepthResult, Difference, Result
from come.report.card import model_card
from come.report.console import COLUMNS, summary_lines, table_rows
from come.report.figures import draw_all
from come.report.numbers import interval, megabytes, title

_SPEED_COLUMNS = (
    "prompt, tokens/s",
    "x dense (of the ideal)",
    "generation, tokens/s",
    "x dense (of the ideal)",
    "peak memory",
    "keys and values",
)
CAPTIONS = {
    "puzzle": "Which original layers, and how many units of each, make up every new layer.",
    "influence": "Score of every eligible group and block influence of every layer, step by step.",
    "perplexity": "Perplexity against depth.",
}


def write_report(folder: Path, result: Result, plan: Plan, base: Path) -> dict[str, Path]:
    """Writes the figures, `report.md` and the model cards; returns the figures' paths by name.

    Args:
        folder: the job folder.
        result: result of the job.
        plan: plan of the job's last model.
        base: folder of the base model, whose card provides metadata.
    """
    figures = draw_all(folder, result, plan)
    lines = [f"# {title(result)}", "", *_table(result), ""]
    lines += [f"- {line}" for line in summary_lines(result)]
    lines += [*_further_texts(result), *_speed(result["depths"]), *_tasks(result["depths"])]
    lines += ["", "Merge history (the original layers of every layer):", ""]
    lines += [f"`{result['merge_history']}`", ""]
    for name, path in figures.items():
        lines += [f"![{name}]({path.name})", "", CAPTIONS[name], ""]
    lines += _continuations(result["depths"])
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    for depth in result["depths"]:
        if depth["folder"]:
            own = folder / depth["folder"]
            card = model_card(result, depth, Plan.load(plan_path(own)), base)
            write_text(own / "README.md", str(card))
    return figures


def _table(result: Result) -> list[str]:
    return [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---:|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in table_rows(result)),
    ]


def _further_texts(result: Result) -> list[str]:
    """Section with the perplexity on the texts of `eval.extra_texts`."""
    if not result["eval_also"]:
        return []
    lines = ["", "## Further texts", ""]
    lines += ["| layers | text | perplexity [95%] | x dense [95%] |", "|---:|---|---:|---:|"]
    for depth in result["depths"]:
        for name, found in depth["also"].items():
            value = interval(found["value"], found["low"], found["high"], 2)
            ratio = interval(found["ratio"], found["ratio_low"], found["ratio_high"], 3)
            shown = ratio if depth["folder"] else ""
            lines.append(f"| {_place(depth)} | {name} | {value} | {shown} |")
    sources = [
        f"- {name}: {found['tokens']} tokens in {found['windows']} windows of "
        f"{result['eval_also'][name]}"
        for name, found in result["depths"][0]["also"].items()
    ]
    return [*lines, "", *sources]


def _speed(depths: list[DepthResult]) -> list[str]:
    """Section with the speed and memory of the timed models."""
    if depths[0]["speed"] is None:
        return []
    lines = [
        "",
        "## Speed and memory",
        "",
        f"| layers | {' | '.join(_SPEED_COLUMNS)} |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for depth in depths:
        if (found := depth["speed"]) is None:
            continue
        cells = [_place(depth)]
        for value, spread, ratio, realised in (
            (
                found["prompt"],
                found["prompt_spread"],
                found["prompt_ratio"],
                found["prompt_realised"],
            ),
            (
                found["generation"],
                found["generation_spread"],
                found["generation_ratio"],
                found["generation_realised"],
            ),
        ):
            cells.append(f"{value:.1f} [{spread[0]:.1f}, {spread[1]:.1f}]")
            cells.append(f"{ratio:.2f} ({realised:.0%})" if depth["folder"] else "")
        cells += [megabytes(found["peak_bytes"]), f"{found['cache_bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Medians [slowest, fastest], dense and compressed in turn. Of the ideal: share of the time "
        "saved over share of the layers removed. Memory: weights, and the most above them while "
        "working.",
    ]


def _place(depth: DepthResult) -> str:
    """Number of layers, with the stage for a distilled model."""
    return (
        f"{depth['layers']} {depth['stage']}"
        if depth["stage"] == "distilled"
        else str(depth["layers"])
    )


def _tasks(depths: list[DepthResult]) -> list[str]:
    """Section with the zero-shot tasks, each compared with dense on the same documents."""
    dense = depths[0]["zero_shot"]
    if dense is None:
        return []
    lines = [
        "",
        "## Zero-shot",
        "",
        "| layers | task | documents | value | standard error | minus dense [95%] | McNemar |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for depth in depths:
        assert depth["zero_shot"] is not None
        for name, task in depth["zero_shot"]["tasks"].items():
            gap = _gap(
                {
                    "value": task["difference"],
                    "low": task["difference_low"],
                    "high": task["difference_high"],
                }
            )
            test = "" if task["mcnemar_p"] is None else f"{task['mcnemar_p']:.3f}"
            error = "" if task["stderr"] is None else f"{task['stderr']:.4f}"
            cells = [gap, test] if depth["folder"] else ["", ""]
            lines.append(
                f"| {_place(depth)} | {name}, {task['metric']} | {task['documents']} | "
                f"{task['value']:.4f} | {error} | {' | '.join(cells)} |"
            )
        whole = depth["zero_shot"]
        rows = {n: (v, whole["differences"][n]) for n, v in whole["values"].items()}
        rows = {n: row for n, row in rows.items() if n not in whole["tasks"]}  # groups
        for name, (value, difference) in (rows | {"average": _average(depth)}).items():
            shown = _gap(difference) if depth["folder"] else ""
            lines.append(f"| {_place(depth)} | {name} | | {value:.4f} | | {shown} | |")
    return [*lines, "", "Bold: the interval leaves out zero."]


def _average(depth: DepthResult) -> tuple[float, Difference]:
    assert depth["zero_shot"] is not None
    return depth["zero_shot"]["average"], depth["zero_shot"]["average_difference"]


def _gap(gap: Difference) -> str:
    """Formats a difference with its interval, if any; bold if the interval excludes zero."""
    if gap["low"] is None or gap["high"] is None:
        return f"{gap['value']:+.3f}"
    text = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    return f"**{text}**" if gap["low"] > 0 or gap["high"] < 0 else text


def _continuations(depths: list[DepthResult]) -> list[str]:
    if not depths[0]["continuations"]:
        return []
    lines = ["## Greedy continuations", ""]
    for number, prompt in enumerate(PROMPTS):
        lines += [f"**{prompt}**", "", "| layers | continuation |", "|---:|---|"]
        for depth in depths:
            text = " ".join(depth["continuations"][number].split()).replace("|", "\\|")
            lines.append(f"| {depth['layers']} | {text} |")
        lines.append("")
    return lines
