"""Formats numbers and names for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN = 10_000  # numbers from here on have an exponent


def number(value: float, digits: int) -> str:
    """Formats a number >= 0 with `digits` decimals, or with an exponent if it is large: "2e4"."""
    return f"{value:.{digits}f}" if value < _PLAIN else f"{value:.0e}".replace("e+0", "e")


def label(text: str) -> str:
    """Escapes dollar signs in a figure's text, which matplotlib would render as maths."""
    return text.replace("$", r"\$")


def interval(value: float, low: float, high: float, digits: int) -> str:
    """Formats a number with its interval: "8.97 [7.38, 10.90]"."""
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def megabytes(size: int) -> str:
    """Formats a number of bytes: "538 MB"."""
    return f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Formats a number of seconds: "2 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def title(result: Mapping[str, Any]) -> str:
    """Title of a result, from its model and method: "SmolLM2-135M, come_plus with refit=ridge"."""
    changes = result.get("changes") or []
    return f"{result['model']}, {result['method']}" + (
        f" with {', '.join(changes)}" if changes else ""
    )
