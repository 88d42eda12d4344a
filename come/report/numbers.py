"""Formats numbers and names for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from come.evaluate.base import Metric

_PLAIN = 10_000  # numbers from here on have an exponent


def number(value: float, digits: int) -> str:
    """Formats a number >= 0 with `digits` decimals, or with an exponent if it is large: "2e4"."""
    return f"{value:.{digits}f}" if value < _PLAIN else f"{value:.0e}".replace("e+0", "e")


def label(text: str) -> str:
    """Escapes dollar signs in a figure's text, which matplotlib would render as maths."""
    return text.replace("$", r"\$")


def plain_value(metric: Metric) -> str:
    """Formats a metric's value by its unit: "8.97", "0.512", "81.2" (tokens/s), "538 MB"."""
    return _by_unit(metric, metric.value)


def value(metric: Metric) -> str:
    """Formats a metric's value with its interval, if any: "8.97 [7.38, 10.90]"."""
    if metric.low is None or metric.high is None:
        return plain_value(metric)
    low, high = _by_unit(metric, metric.low), _by_unit(metric, metric.high)
    return f"{plain_value(metric)} [{low}, {high}]"


def relative(metric: Metric) -> str:
    """Formats the comparison with dense: "1.402 [1.380, 1.425]" (x dense), "-0.031 [...]"."""
    found = metric.relative
    if found is None:
        return ""
    if metric.comparison == "difference":
        text, ends = f"{found.value:+.3f}", [f"{e:+.3f}" for e in _ends(found.low, found.high)]
    else:
        text, ends = number(found.value, 3), [number(e, 3) for e in _ends(found.low, found.high)]
    return f"{text} [{', '.join(ends)}]" if ends else text


def comparison(metric: Metric) -> str:
    """Column title of `relative`: "x dense" or "minus dense"."""
    return {"ratio": "x dense", "difference": "minus dense"}.get(metric.comparison, "")


def heading(name: str, metric: Metric) -> str:
    """Column title of a metric: "zero-shot", "prompt, tokens/s"."""
    _, _, own = name.partition("/")
    text = own.replace("/", ", ") or name.replace("_", "-")
    return f"{text}, {metric.unit}" if metric.unit not in ("", "bytes", "share") else text


def _ends(low: float | None, high: float | None) -> list[float]:
    return [] if low is None or high is None else [low, high]


def _by_unit(metric: Metric, value: float) -> str:
    if metric.unit == "bytes":
        return megabytes(value)
    if metric.unit == "share":
        return f"{value:.0%}"
    if metric.unit == "tokens/s":
        return f"{value:.1f}"
    return f"{value:.3f}" if metric.comparison == "difference" else number(value, 2)


def megabytes(size: int | float) -> str:
    """Formats a number of bytes: "538 MB", "1.2 MB"."""
    return f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"


def duration(seconds: float) -> str:
    """Formats a number of seconds: "2 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def title(result: Mapping[str, Any]) -> str:
    """Title of a result, from its model and method: "smollm2_135m, come_plus with refit=ridge"."""
    changes = result.get("changes") or []
    return f"{result['model']}, {result['method']}" + (
        f" with {', '.join(changes)}" if changes else ""
    )
