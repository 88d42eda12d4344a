"""Tables of a grid: Markdown to read, LaTeX to print, CSV to compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from come.report.points import PARAMETERS, Measured, Point


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        head: of every column.
        rows: cells.
        labels: how many columns stand on the left.
    """

    head: list[str]
    rows: list[list[str]]
    labels: int = 1

    def markdown(self) -> str:
        """Lines of Markdown."""
        aligned = "---|" * self.labels + "---:|" * (len(self.head) - self.labels)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.head, *self.rows)]
        return "\n".join([lines[0], f"|{aligned}", *lines[1:]]) + "\n"

    def latex(self) -> str:
        """A tabular with booktabs' rules."""
        columns = "l" * self.labels + "r" * (len(self.head) - self.labels)
        frame = pd.DataFrame(self.rows, columns=self.head)
        return frame.to_latex(index=False, escape=True, column_format=columns)


def perplexity_table(points: Sequence[Point], x: str) -> Table:
    """A row for each line and place, a column for each depth; cells are perplexity, x dense."""
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
    """A row for each model, a column for each task; a star where the difference to dense is real.

    Of several seeds means, without stars.
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
        averages = [p.average for p in here if p.average is not None]
        cells.append(f"{_mean([a.value for a in averages]):.3f}")
        cells.append(f"{_mean([a.against for a in averages]):.1%}")
        rows.append(cells)
    return Table(head, rows, 1 + by_x)


def long_table(points: Sequence[Point], x: str) -> str:
    """One line of CSV for every model and measured value, with its 95% interval."""
    records = []
    for point in points:
        place = {"line": point.line} | ({} if x == PARAMETERS else {x: point.x})
        place |= {"seed": point.seed, "layers": point.layers, "parameters": point.parameters}  # type: ignore[dict-item]
        measured = {"perplexity": point.perplexity, "average": point.average}
        measured |= {f"perplexity {name}": value for name, value in point.also.items()}
        measured |= point.tasks
        for name, value in measured.items():
            if value is not None:
                numbers = {"value": value.value, "against_dense": value.against}
                records.append(
                    place | {"measure": name} | numbers | {"low": value.low, "high": value.high}
                )
    return pd.DataFrame(records).to_csv(index=False)


def _perplexity_cell(found: Sequence[Measured]) -> str:
    if not found:
        return ""
    ratios = [m.against for m in found]
    spread = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(found) > 1 else ""
    value = _number(_mean([m.value for m in found]), 1)
    return f"{value}, {_number(_mean(ratios), 2)}{spread}"


def _accuracy_cell(found: Sequence[Measured]) -> str:
    if not found:
        return ""
    real = len(found) == 1 and (found[0].low > 0 or found[0].high < 0)
    gap = _mean([m.against for m in found])
    return f"{_mean([m.value for m in found]):.3f} ({gap:+.3f}{'*' if real else ''})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float, digits: int) -> str:
    """A number with so many decimals, or with an exponent where it is large."""
    return f"{value:.{digits}f}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")
