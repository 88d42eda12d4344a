"""Tables of a sweep, as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from come.report.numbers import number
from come.report.points import PARAMETERS, Measured, Point


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

    def markdown(self) -> str:
        """The table as Markdown."""
        aligned = "---|" * self.labels + "---:|" * (len(self.head) - self.labels)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.head, *self.rows)]
        return "\n".join([lines[0], f"|{aligned}", *lines[1:]]) + "\n"

    def latex(self) -> str:
        """The table as a LaTeX tabular with booktabs rules."""
        columns = "l" * self.labels + "r" * (len(self.head) - self.labels)
        frame = pd.DataFrame(self.rows, columns=self.head)
        return frame.to_latex(index=False, escape=True, column_format=columns)


def perplexity_table(points: Sequence[Point], x: str) -> Table:
    """Perplexity and its ratio to dense: a row per label, `x` and text, and a column per depth."""
    by_x = x != PARAMETERS
    texts = list(dict.fromkeys(["", *(name for point in points for name in point.also)]))
    depths = sorted({point.layers for point in points}, reverse=True)
    head = ["", *([x] if by_x else []), *(["text"] if len(texts) > 1 else [])]
    rows = []
    for line, place in dict.fromkeys((p.line, p.x if by_x else "") for p in points):
        for text in texts:
            cells = [line, *([place] if by_x else []), *([text or "-"] if len(texts) > 1 else [])]
            for depth in depths:
                here = [
                    p.also.get(text) if text else p.perplexity
                    for p in points
                    if (p.line, p.x if by_x else "", p.layers) == (line, place, depth)
                ]
                cells.append(_perplexity_cell([m for m in here if m is not None]))
            rows.append(cells)
    return Table([*head, *(f"{depth} layers" for depth in depths)], rows, len(head))


def zero_shot_table(points: Sequence[Point], x: str) -> Table:
    """Accuracy and its difference to dense: one row per model, one column per task.

    A star marks a difference whose 95% confidence interval excludes zero. Models that differ only
    in a seed share a row of means, without stars.
    """
    by_x = x != PARAMETERS
    points = [point for point in points if point.average is not None]
    names = list(dict.fromkeys(name for point in points for name in point.tasks))
    head = ["", *([x] if by_x else []), "layers", *names, "average", "of dense"]
    rows = []
    keys = dict.fromkeys((p.line, p.x if by_x else "", p.layers) for p in points)
    for line, place, depth in keys:
        here = [
            p for p in points if (p.line, p.x if by_x else "", p.layers) == (line, place, depth)
        ]
        cells = [line, *([place] if by_x else []), str(depth)]
        for name in names:
            cells.append(_accuracy_cell([p.tasks[name] for p in here if name in p.tasks]))
        cells.append(_accuracy_cell([p.average for p in here if p.average is not None]))
        cells.append(f"{_mean([p.retention for p in here]):.1%}")
        rows.append(cells)
    return Table(head, rows, 1 + by_x)


def speed_table(points: Sequence[Point], x: str) -> Table:
    """Tokens/s, ratio to dense (share of the ideal saving realised) and memory: a row per model."""
    by_x = x != PARAMETERS
    head = ["", *([x] if by_x else []), "layers", "prompt, tokens/s", "generation, tokens/s"]
    rows = []
    for point in points:
        if (found := point.speed) is None:
            continue
        cells = [point.line, *([point.x] if by_x else []), str(point.layers)]
        for work in ("prompt", "generation"):
            cells.append(
                f"{found[work]:.1f}, {found[f'{work}_ratio']:.2f} ({found[f'{work}_realised']:.0%})"
            )
        cells += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['cache_bytes'] / 1e6:.1f}"]
        rows.append(cells)
    return Table([*head, "peak memory, MB", "keys and values, MB"], rows, 1 + by_x)


def long_table(points: Sequence[Point], x: str) -> str:
    """A CSV with one line for every model and measured value.

    `ratio` is the ratio to the dense model (perplexity, speed), and `difference` the difference to
    it (accuracy). `low` and `high` are the ends of the 95% confidence interval, if there is one.
    """
    records = []
    for point in points:
        place: dict[str, Any] = {"line": point.line} | ({} if x == PARAMETERS else {x: point.x})
        place |= {"seed": point.seed, "layers": point.layers, "parameters": point.parameters}
        ratios = {f"perplexity {name}": value for name, value in point.also.items()}
        if point.perplexity is not None:
            ratios = {"perplexity": point.perplexity} | ratios
        gaps = point.tasks | ({"average": point.average} if point.average is not None else {})
        for kind, found in (("ratio", ratios), ("difference", gaps)):
            for name, value in found.items():
                numbers = {"value": value.value, kind: value.against}
                interval = {"low": value.low, "high": value.high}
                records.append(place | {"measure": name} | numbers | interval)
        for work in ("prompt", "generation") if point.speed else ():
            assert point.speed is not None
            value, ratio = point.speed[work], point.speed[f"{work}_ratio"]
            named: dict[str, Any] = {"measure": f"{work} tokens/s", "value": value, "ratio": ratio}
            records.append(place | named)
    return pd.DataFrame(records).to_csv(index=False)


def _perplexity_cell(found: Sequence[Measured]) -> str:
    if not found:
        return ""
    ratios = [m.against for m in found]
    ends = number(min(ratios), 2), number(max(ratios), 2)
    spread = f" [{', '.join(ends)}]" if len(found) > 1 else ""
    value = number(_mean([m.value for m in found]), 1)
    return f"{value}, {number(_mean(ratios), 2)}{spread}"


def _accuracy_cell(found: Sequence[Measured]) -> str:
    if not found:
        return ""
    real = len(found) == 1 and ((found[0].low or 0) > 0 or (found[0].high or 0) < 0)
    gap = _mean([m.against for m in found])
    return f"{_mean([m.value for m in found]):.3f} ({gap:+.3f}{'*' if real else ''})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
