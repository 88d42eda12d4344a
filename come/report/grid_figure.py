"""The figure of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

from come.report.numbers import label as plain_label
from come.report.records import PARAMETERS, ModelRecord

_DPI = 110
_MAX_INSIDE = 16  # longer legends are drawn outside the axes
_MAX_LABELS = 8  # most labels in a figure
_LARGE_LEGEND = 5  # lines up to which the legend has a larger font
_NARROW = 4  # ratio of the ends of the vertical axis, below which its ticks are evenly spaced
_TAB10 = 10  # number of colours in matplotlib's tab10
_MAX_RATIO = 15.0  # the y axis ends at this ratio to dense, to tell smaller ones apart


def draw_grid(
    models: Sequence[ModelRecord], path: Path, x: str, title: str, *, cut: float = _MAX_RATIO
) -> None:
    """Draws perplexity over `x`, with one line per label (and per depth, if `x` is a key).

    Of more than eight labels, those with the lowest perplexities are drawn.

    If the jobs were evaluated on different texts, the ratio to dense is drawn instead. If a ratio
    is above `cut`, the vertical axis ends there.
    """
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    several = x != PARAMETERS and len({model.layers for model in models}) > 1
    lines: dict[str, dict[str, list[float]]] = {}
    texts = {model.text for model in models}
    ratios = []
    models, left_out = _best(models)
    for model in models:
        if model.perplexity is None:
            continue
        ratio = model.perplexity.relative.value if model.perplexity.relative else 1.0
        value = model.perplexity.value if len(texts) == 1 else ratio
        ratios.append(ratio)
        name = f"{model.line}, {model.layers} layers" if several else model.line
        lines.setdefault(name, {}).setdefault(model.x, []).append(value)
    numeric = all(_is_number(place) for places in lines.values() for place in places)
    colours = plt.get_cmap("tab10" if len(lines) <= _TAB10 else "tab20")
    for number, (name, places) in enumerate(lines.items()):
        order = sorted(places, key=float) if numeric else list(places)
        across: list[Any] = [float(place) for place in order] if numeric else order
        if x == PARAMETERS:
            across = [value / 1e6 for value in across]
        mean = [sum(places[p]) / len(places[p]) for p in order]
        # a mean of equal values can be rounded to outside of them
        low = [max(0.0, m - min(places[p])) for m, p in zip(mean, order, strict=True)]
        high = [max(0.0, max(places[p]) - m) for m, p in zip(mean, order, strict=True)]
        spread = [low, high] if any(low) or any(high) else None
        style = ["o-", "s--", "^:", "D-."][number // 20 % 4]
        axis.errorbar(
            across, mean, yerr=spread, fmt=style, ms=4, lw=1.3, capsize=3,
            color=colours(number % colours.N), label=plain_label(name),
        )  # fmt: skip
    level = models[0].text[0] if len(texts) == 1 else 1.0
    axis.axhline(level, color="black", lw=0.8, ls=":", label="dense")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_ylabel("perplexity" if len(texts) == 1 else "perplexity, x dense")
    if max(ratios) > cut:
        axis.set_ylim(level * 0.95, level * cut)
        axis.set_ylabel(f"{axis.get_ylabel()} (cut at {cut:g} x)")
    bottom, top = axis.get_ylim()
    if top < bottom * _NARROW:  # a logarithmic axis would have too few ticks
        axis.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("parameters, millions" if x == PARAMETERS else plain_label(x))
    if x == PARAMETERS:
        axis.invert_xaxis()
    elif numeric:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    more = f"\nthe best {_MAX_LABELS}; {left_out} more in the table" if left_out else ""
    axis.set_title(plain_label(title) + more, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    if len(lines) > _MAX_INSIDE:
        figure.set_figwidth(12)
        figure.legend(fontsize=7, loc="outside right upper")
    else:
        size = 9 if len(lines) <= _LARGE_LEGEND else 7
        axis.legend(fontsize=size, ncols=2 if len(lines) > _MAX_INSIDE // 2 else 1)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _best(models: Sequence[ModelRecord]) -> tuple[list[ModelRecord], int]:
    """The models of the labels with the lowest mean log ratio, and the number of other labels."""
    ratios: dict[str, list[float]] = {}
    for model in models:
        found = model.perplexity
        if found is not None:
            ratio = found.relative.value if found.relative else 1.0
            ratios.setdefault(model.line, []).append(math.log(ratio))
    order = sorted(ratios, key=lambda line: fmean(ratios[line]))
    return [model for model in models if model.line in order[:_MAX_LABELS]], max(
        0, len(order) - _MAX_LABELS
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
