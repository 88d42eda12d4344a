"""Writes `report.md`, `report.html` and their figures, and the card of every saved model."""

from __future__ import annotations

from pathlib import Path

from come.evaluate.base import Metric
from come.files import write_text
from come.merge.plan import Plan
from come.merge.saving import plan_path
from come.records import DepthResult, Result, ShapeResult
from come.report.card import model_card, units_kept
from come.report.console import summary_lines, summary_table
from come.report.figures import draw_all
from come.report.html import html_report
from come.report.numbers import comparison, relative, title, value
from come.report.tables import Table

_BOLD = (
    "Bold: differs from the dense model. The 95% interval (paired) excludes no difference, and "
    "McNemar's test, if there is one, agrees (p < 0.05)."
)
_SHORT = 40  # characters; a longer description of the data is below the table
CAPTIONS = {
    "puzzle": "Which original layers, and how many units of each, make up every new layer.",
    "influence": "Score of every eligible span and block influence of every layer, step by step.",
    "perplexity": "Perplexity against depth.",
    "training": "Loss during the distillation.",
}


def write_report(folder: Path, result: Result, plan: Plan, base: Path) -> dict[str, Path]:
    """Writes figures, reports and model cards; returns the figures' paths by name.

    Args:
        folder: the job folder.
        result: result of the job.
        plan: plan of the job's last model.
        base: folder of the base model, whose card provides metadata.
    """
    figures = draw_all(folder, result, plan)
    lines = [f"# {title(result)}", "", summary_table(result).markdown().strip(), ""]
    lines += [f"- {line}" for line in summary_lines(result)]
    for name in dict.fromkeys(key.partition("/")[0] for key in result["depths"][0]["metrics"]):
        lines += _section(name, result["depths"])
    lines += _shapes(result.get("shape"))
    lines += ["", "## Run", "", *_run(result, plan), ""]
    for name, path in figures.items():
        lines += [f"![{name}]({path.name})", "", CAPTIONS[name], ""]
    report = "\n".join(lines) + "\n"
    write_text(folder / "report.md", report)
    write_text(folder / "report.html", html_report(report, folder))
    for depth in result["depths"]:
        if depth["folder"]:
            own = folder / depth["folder"]
            card = model_card(result, depth, Plan.load(plan_path(own)), base)
            write_text(own / "README.md", str(card))
    return figures


def _run(result: Result, plan: Plan) -> list[str]:
    """How the models were made: command, parts of the method, machine and versions."""
    recipe = plan.provenance.get("recipe", {})
    parts = [f"{key} `{part['name']}`" for key, part in recipe.items() if isinstance(part, dict)]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = {
        "command": f"`{result['command']}`" if result["command"] else "",
        "method": ", ".join(parts),
        "merge history (the original layers of every layer)": f"`{result['merge_history']}`",
        "units of every layer": units_kept(plan),
        "dropped sublayers, which stay in the file as zeros": plan.dropped.described()
        if plan.dropped
        else "",
        "machine": result["machine"],
        "versions": versions,
    }
    return [f"- {name}: {text}" for name, text in lines.items() if text]


def _shapes(search: ShapeResult | None) -> list[str]:
    """Section with the depths and widths that `merge.budget` allowed; the chosen one is bold."""
    if search is None:
        return []
    rows = []
    for index, own in enumerate(search["candidates"]):
        kl = "" if own["kl"] is None else f"{own['kl']:.4f}"
        row = [str(own["layers"]), str(own["channels"] or ""), f"{own['share']:.3f}", kl]
        rows.append([f"**{cell}**" if cell and index == search["chosen"] else cell for cell in row])
    head = ["layers", "FFN channels", f"{search['quantity']} / dense", "KL of a trial, nats/token"]
    table = Table(head, rows, labels=0).without_empty_columns()
    limit = f"At most {search['budget']:g} of the dense model's {search['quantity']}."
    return ["", "## Shape", "", table.markdown().strip(), "", limit]


def _section(evaluation: str, depths: list[DepthResult]) -> list[str]:
    """Section with all metrics of an evaluation, and the texts in their details."""
    found = [
        (_place(depth), name, Metric.read(record))
        for depth in depths
        for name, record in depth["metrics"].items()
        if name.partition("/")[0] == evaluation
    ]
    if len({name for _, name, _ in found}) == 1 and all(m.headline for _, _, m in found):
        return []  # already in the summary
    against = next((comparison(metric) for _, _, metric in found if metric.comparison), "")
    data = {name: {metric.data for _, own, metric in found if own == name} for _, name, _ in found}
    rows = [
        [place, _label(name, metric), value(metric), _relative(metric), _p(metric),
         metric.data if len(data[name]) > 1 or len(metric.data) < _SHORT else ""]
        for place, name, metric in found
    ]  # fmt: skip
    ends = ["[95%]" if any("[" in row[column] for row in rows) else "" for column in (2, 3)]
    head = ["layers", "metric", f"value {ends[0]}".strip(), f"{against} {ends[1]}".strip()]
    head += ["McNemar's p", "measured on"]
    table = Table(head, rows, labels=2).without_empty_columns()
    lines = ["", f"## {evaluation.replace('_', ' ').capitalize()}", "", table.markdown().strip()]
    long = [
        f"- {name}: {next(iter(texts))}"
        for name, texts in data.items()
        if len(texts) == 1 and len(next(iter(texts))) >= _SHORT
    ]
    lines += ["", *long] if long else []
    if any("**" in cell for row in rows for cell in row):
        lines += ["", _BOLD]
    texts: dict[str, list[str]] = {}
    for place, _, metric in found:
        for prompt, text in metric.details.get("texts", {}).items():
            texts.setdefault(prompt, []).append(f"- {place} layers: {' '.join(text.split())}")
    for prompt, items in texts.items():
        lines += ["", f"**{prompt}**", "", *items]
    return lines


def _label(name: str, metric: Metric) -> str:
    """Name of a metric in its evaluation's section, such as "arc_easy, acc"."""
    own = name.partition("/")[2] or name.replace("_", "-")
    kind = metric.details.get("metric", "")
    if kind and not own.endswith(f"/{kind}"):
        return f"{own}, {kind}"
    unit = f", {metric.unit}" if metric.unit == "tokens/s" else ""
    return own.replace("/", ", ") + unit


def _relative(metric: Metric) -> str:
    shown = relative(metric)
    return f"**{shown}**" if metric.significant else shown


def _p(metric: Metric) -> str:
    found = metric.relative
    return f"{found.p:.3f}" if found is not None and found.p is not None else ""


def _place(depth: DepthResult) -> str:
    """Number of layers, with the stage for a distilled model."""
    distilled = depth["stage"] == "distilled"
    return f"{depth['layers']} distilled" if distilled else str(depth["layers"])
