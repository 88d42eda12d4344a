"""Tables, as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from come.evaluate.base import Metric, Relative
from come.report.numbers import heading, number, plain_value, relative
from come.report.records import PARAMETERS, ModelRecord


@dataclass(frozen=True)
class Table:
    """A table whose cells are text.

    Attributes:
        head: header of every column.
        rows: cells of every row.
        labels: number of first columns, which are left-aligned; the others are right-aligned.
    """

    head: list[str]
    rows: list[list[str]]
    labels: int = 1

    def without_empty_columns(self) -> Table:
        """The table without columns that have no value in any row."""
        kept = [i for i in range(len(self.head)) if any(row[i] for row in self.rows)]
        labels = sum(i < self.labels for i in kept)
        return Table(
            [self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows], labels
        )

    def markdown(self) -> str:
        """The table as Markdown."""
        aligned = "---|" * self.labels + "---:|" * (len(self.head) - self.labels)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.head, *self.rows)]
        return "\n".join([lines[0], f"|{aligned}", *lines[1:]]) + "\n"

    def latex(self) -> str:
        """The table as a LaTeX tabular with booktabs rules."""
        import pandas as pd  # takes half a second to import

        columns = "l" * self.labels + "r" * (len(self.head) - self.labels)
        rows = [[cell.replace("**", "") for cell in row] for row in self.rows]
        frame = pd.DataFrame(rows, columns=self.head)
        return frame.to_latex(index=False, escape=True, column_format=columns)


def depth_table(models: Sequence[ModelRecord], x: str) -> Table:
    """Perplexity and its ratio to dense: a row per label, `x` and text, and a column per depth.

    A single model's ratio has its 95% interval; several seeds have the mean ratio and [lowest,
    highest]. The lowest ratio of a column is bold, if a column has several.
    """
    by_x = x != PARAMETERS
    texts = _names(models, "perplexity")
    depths = sorted({model.layers for model in models}, reverse=True)
    head = ["", *([x] if by_x else []), *(["text"] if len(texts) > 1 else [])]
    rows, ratios = [], []
    for line, place in dict.fromkeys((p.line, p.x if by_x else "") for p in models):
        for text in texts:
            name = text.partition("/")[2] or "-"
            row = [line, *([place] if by_x else []), *([name] if len(texts) > 1 else [])]
            found = [
                [
                    p.metrics[text]
                    for p in models
                    if (p.line, p.x if by_x else "", p.layers) == (line, place, depth)
                    and text in p.metrics
                ]
                for depth in depths
            ]
            rows.append([*row, *map(_ratio_cell, found)])
            ratios.append((text, [_ratio(cell) for cell in found]))
    labels = len(head)
    for text in texts:
        for column in range(len(depths)):
            own = [
                (ratio[column], row)
                for (of, ratio), row in zip(ratios, rows, strict=True)
                if of == text and ratio[column] is not None
            ]
            if len(own) > 1:
                _, best = min(own, key=lambda entry: entry[0] or 0.0)
                best[labels + column] = f"**{best[labels + column]}**"
    return Table([*head, *(f"{depth} layers" for depth in depths)], rows, labels)


def metric_table(models: Sequence[ModelRecord], evaluation: str, x: str) -> Table:
    """The metrics of an evaluation with their comparison to dense: one row per model.

    A star marks a significant difference. Models that differ only in a seed share a row of means,
    without stars.
    """
    by_x = x != PARAMETERS
    names = _names(models, evaluation)
    head = ["", *([x] if by_x else []), "layers"]
    rows = []
    heads: dict[str, str] = {}
    keys = dict.fromkeys((p.line, p.x if by_x else "", p.layers) for p in models)
    for line, place, depth in keys:
        cells = [line, *([place] if by_x else []), str(depth)]
        for name in names:
            here = [
                p.metrics[name]
                for p in models
                if (p.line, p.x if by_x else "", p.layers) == (line, place, depth)
                and name in p.metrics
            ]
            if here:
                heads[name] = heading(name, here[0])
            cells.append(_cell(here))
        if any(cells[len(head) :]):
            rows.append(cells)
    return Table([*head, *(heads.get(name, name) for name in names)], rows, 1 + by_x)


def long_table(models: Sequence[ModelRecord], x: str) -> str:
    """A CSV with one line for every model and metric.

    `ratio` or `difference` is the comparison with the dense model; `low` and `high` are the ends of
    its 95% confidence interval, if there is one.
    """
    records = []
    for model in models:
        place: dict[str, Any] = {"line": model.line} | ({} if x == PARAMETERS else {x: model.x})
        place |= {"seed": model.seed, "layers": model.layers, "parameters": model.parameters}
        for name, metric in model.metrics.items():
            record = place | {"metric": name, "unit": metric.unit, "value": metric.value}
            if metric.relative is not None:
                record[metric.comparison] = metric.relative.value
                record |= {"low": metric.relative.low, "high": metric.relative.high}
            records.append(record)
    import pandas as pd  # takes half a second to import

    return pd.DataFrame(records).to_csv(index=False)


def _names(models: Sequence[ModelRecord], evaluation: str) -> list[str]:
    """Names of the evaluation's metrics, in order of first appearance."""
    names = dict.fromkeys(name for model in models for name in model.metrics)
    return [name for name in names if name.partition("/")[0] == evaluation]


def _ratio(found: Sequence[Metric]) -> float | None:
    ratios = [metric.relative.value for metric in found if metric.relative]
    return _mean(ratios) if ratios else None


def _ratio_cell(found: Sequence[Metric]) -> str:
    if not found:
        return ""
    value = number(_mean([metric.value for metric in found]), 1)
    ratios = [metric.relative for metric in found if metric.relative]
    if not ratios:
        return value
    if len(ratios) > 1:
        low, high = min(r.value for r in ratios), max(r.value for r in ratios)
    elif ratios[0].low is None or ratios[0].high is None:
        return f"{value}, {number(ratios[0].value, 2)}"
    else:
        low, high = ratios[0].low, ratios[0].high
    mean = _mean([r.value for r in ratios])
    return f"{value}, {number(mean, 2)} [{number(low, 2)}, {number(high, 2)}]"


def _cell(found: Sequence[Metric]) -> str:
    if not found:
        return ""
    if len(found) == 1:
        against = relative(found[0]).partition(" [")[0]
        star = "*" if found[0].comparison == "difference" and found[0].significant else ""
        return plain_value(found[0]) + (f" ({against}{star})" if against else "")
    ratios = [metric.relative.value for metric in found if metric.relative]
    mean = replace(
        found[0],
        value=_mean([metric.value for metric in found]),
        relative=Relative(_mean(ratios)) if ratios else None,
    )
    return f"{plain_value(mean)} ({relative(mean)})" if ratios else plain_value(mean)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
