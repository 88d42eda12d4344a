"""The results of many jobs: one table and one figure, from their `result.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from come.files import LISTING, RESULT, write_text

PARAMETERS = "parameters"
_DPI = 110
_CUT = 15  # ratios above it leave the figure, so that the others can be told apart


Row = dict[str, Any]
"""One finished job: `job` (its hash), `overrides` (what its command line set, key to value), and of
its result `depths` (dense first), `compression`, `merge_history` and, if any, `distillation`."""


@dataclass(frozen=True)
class Point:
    """One model of one job: where it stands in the table and in the figure.

    Attributes:
        line: label of its line in the figure and its row in the table.
        x: place on the horizontal axis.
        layers: depth of the model.
        ratio: perplexity over dense.
        perplexity: the perplexity.
        dense: perplexity of the dense model, tokens and windows of the text.
    """

    line: str
    x: str
    layers: int
    ratio: float
    perplexity: float
    dense: tuple[float, int, int]


def read_grid(folder: Path, also: Sequence[Path] = ()) -> tuple[list[Row], list[dict[str, str]]]:
    """What a sweep has finished, from the list of its jobs and their `result.json`.

    Args:
        folder: the grid's folder, with `jobs.jsonl`; of a job that is listed twice the last entry
            counts.
        also: `results.jsonl` files of the same grid, written elsewhere; a job of the sweep itself
            takes the place of the same one there.

    Returns:
        The finished jobs, and the overrides of those that have not.
    """
    listing = folder / LISTING
    jobs: dict[str, tuple[dict[str, str], Path]] = {}
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        entry = json.loads(line)
        overrides = {}
        for item in entry["overrides"]:
            key, _, value = item.lstrip("+").partition("=")
            overrides[key] = value
        jobs[json.dumps(overrides, sort_keys=True)] = overrides, Path(entry["folder"])
    short = _short_paths([overrides for overrides, _ in jobs.values()])
    rows, missing, seen = [], [], []
    for overrides, job in jobs.values():
        shown = {key: short.get(value, value) for key, value in overrides.items()}
        seen.append(shown)
        if (job / RESULT).is_file():
            rows.append(_row(shown, json.loads((job / RESULT).read_text())))
        else:
            missing.append(shown)
    for path in also:
        others = [json.loads(line) for line in path.read_text().splitlines()]
        rows += [row for row in others if row["overrides"] not in seen]
    return rows, missing


def write_grid(
    folder: Path,
    rows: Sequence[Row],
    missing: Sequence[Mapping[str, str]] = (),
    *,
    x: str = PARAMETERS,
    title: str = "",
) -> str:
    """Writes `table.md`, `figure.png` and `results.jsonl`.

    Jobs that differ in nothing but a seed share a row of the table, as mean and [lowest, highest].

    Args:
        folder: where to.
        rows: finished jobs.
        missing: overrides of jobs that have not finished.
        x: the figure's horizontal axis: "parameters", or a key that the jobs differ in.
        title: of the figure.

    Returns:
        The table, Markdown.
    """
    varying = _varying([*(row["overrides"] for row in rows), *missing])
    points = [point for row in rows for point in _points(row, varying, x)]
    table = _table(points, [_label(job, varying) for job in missing], x)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / "table.md", table)
    if points:
        _draw(points, folder / "figure.png", x, title)
    return table


def _short_paths(jobs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Files by their names alone, where no two files of the grid share one."""
    paths = sorted({v for job in jobs for k, v in job.items() if k.endswith("path")})
    names = [Path(path).name for path in paths]
    return {path: name for path, name in zip(paths, names, strict=True) if names.count(name) == 1}


def _row(overrides: dict[str, str], result: Mapping[str, Any]) -> Row:
    """What the table and figure rest on, without the settings and every window."""
    depths = [
        {key: depth[key] for key in ("layers", "parameters", "sparsity", "stage") if key in depth}
        | {"perplexity": {k: v for k, v in (depth["perplexity"] or {}).items() if k != "nll"}}
        for depth in result["depths"]
    ]
    return {
        "job": result["job"],
        "overrides": overrides,
        "depths": depths,
        "compression": {
            k: result["compression"][k] for k in ("seconds", "layer_passes", "peak_bytes")
        },
        "merge_history": result["merge_history"],
    } | ({"distillation": result["distillation"]} if result.get("distillation") else {})


def _varying(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys of the command line that the jobs differ in, in its order."""
    keys = dict.fromkeys(key for job in jobs for key in job)
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def _label(overrides: Mapping[str, str], keys: Iterable[str]) -> str:
    parts = [
        overrides[key] if "." not in key else f"{key.split('.', 1)[1]}={overrides[key]}"
        for key in keys
        if key in overrides
    ]
    return ", ".join(parts) or "all"


def _points(row: Row, varying: Sequence[str], x: str) -> list[Point]:
    """One point for every compressed model of a job that has a perplexity."""
    dense = row["depths"][0]["perplexity"]
    distilled = "distillation" in row
    line = _label(row["overrides"], [k for k in varying if k != x and not k.endswith("seed")])
    return [
        Point(
            line=line + (", merged" if distilled and depth["stage"] == "merged" else ""),
            x=str(depth["parameters"]) if x == PARAMETERS else _place(row["overrides"].get(x, "")),
            layers=depth["layers"],
            ratio=depth["perplexity"]["ratio"],
            perplexity=depth["perplexity"]["value"],
            dense=(round(dense["value"], 3), dense["tokens"], dense["windows"]),
        )
        for depth in row["depths"][1:]
        if depth["perplexity"]
    ]


def _place(value: str) -> str:
    """A value's place on the axis: itself, or the first layer of a group given by hand."""
    return value.strip("[").split(",")[0] if value.startswith("[[") else value


def _table(points: Sequence[Point], missing: Sequence[str], x: str) -> str:
    """A row for each line and place, a column for each depth; cells are perplexity, x dense."""
    depths = sorted({point.layers for point in points}, reverse=True)
    by_x = x != PARAMETERS
    rows = list(dict.fromkeys((p.line, p.x if by_x else "") for p in points))
    head = ["", *([x] if by_x else []), *(f"{depth} layers" for depth in depths)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * (1 + by_x)}{'---:|' * len(depths)}"]
    for line, place in rows:
        cells = []
        for depth in depths:
            found = [
                p for p in points if (p.line, p.x if by_x else "", p.layers) == (line, place, depth)
            ]
            cells.append(_cell(found))
        lines.append(f"| {' | '.join([line, *([place] if by_x else []), *cells])} |")
    if points:
        lines += [
            "",
            "Perplexity, and behind it perplexity over the dense model's; of several seeds",
        ]
        lines += ["means, and [lowest, highest] of the latter. Dense:", ""]
        texts = sorted({point.dense for point in points})
        lines += [f"- {value:.2f}, {t} tokens in {w} windows" for value, t, w in texts]
    if missing:
        lines += ["", f"Not finished: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _cell(found: Sequence[Point]) -> str:
    if not found:
        return ""
    perplexity = sum(p.perplexity for p in found) / len(found)
    ratios = [p.ratio for p in found]
    ratio = sum(ratios) / len(ratios)
    spread = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(found) > 1 else ""
    return f"{_number(perplexity, 1)}, {_number(ratio, 2)}{spread}"


def _number(value: float, digits: int) -> str:
    """A number with so many decimals, or with an exponent where it is large."""
    return f"{value:.{digits}f}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")


def _draw(points: Sequence[Point], path: Path, x: str, title: str) -> None:
    """Perplexity over the horizontal axis, a line for each label (and depth, where x is a key).

    Jobs that were evaluated on different texts are drawn relative to their dense models.
    """
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    several = x != PARAMETERS and len({point.layers for point in points}) > 1
    lines: dict[str, dict[str, list[float]]] = {}
    texts = {point.dense for point in points}
    for point in points:
        value = point.perplexity if len(texts) == 1 else point.ratio
        name = f"{point.line}, {point.layers} layers" if several else point.line
        lines.setdefault(name, {}).setdefault(point.x, []).append(value)
    numeric = all(_is_number(place) for places in lines.values() for place in places)
    colours = plt.get_cmap("tab20")
    for number, (name, places) in enumerate(lines.items()):
        order = sorted(places, key=float) if numeric else list(places)
        across: list[Any] = [float(place) for place in order] if numeric else order
        if x == PARAMETERS:
            across = [value / 1e6 for value in across]
        mean = [sum(places[p]) / len(places[p]) for p in order]
        low = [m - min(places[p]) for m, p in zip(mean, order, strict=True)]
        high = [max(places[p]) - m for m, p in zip(mean, order, strict=True)]
        spread = [low, high] if any(low) or any(high) else None
        style = ["o-", "s--", "^:", "D-."][number // 20 % 4]
        axis.errorbar(
            across, mean, yerr=spread, fmt=style, ms=4, lw=1.3, capsize=3,
            color=colours(number % 20), label=name,
        )  # fmt: skip
    level = points[0].dense[0] if len(texts) == 1 else 1.0
    axis.axhline(level, color="black", lw=0.8, ls=":", label="dense")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_ylabel("perplexity" if len(texts) == 1 else "perplexity, x dense")
    if max(point.ratio for point in points) > _CUT:
        axis.set_ylim(level * 0.9, level * _CUT)
        axis.set_ylabel(f"{axis.get_ylabel()} (cut at {_CUT} x)")
    axis.set_xlabel("parameters, millions" if x == PARAMETERS else x)
    if x == PARAMETERS:
        axis.invert_xaxis()
    elif numeric:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, ncols=2 if len(lines) > 8 else 1)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
