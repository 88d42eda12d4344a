"""The models of a grid: which line and place each belongs to, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARAMETERS = "parameters"

Row = dict[str, Any]
"""One finished job: `job` (its hash), `overrides` (what its command line set, key to value), and of
its result `depths` (dense first), `compression`, `merge_history` and, if any, `distillation`."""


@dataclass(frozen=True)
class Measured:
    """A value of a model, and the dense model's on the same work.

    Attributes:
        value: perplexity, or the accuracy of a task.
        against: perplexity over the dense model's, or accuracy minus the dense model's.
        low: of the 95% interval of `against`.
        high: of the 95% interval of `against`.
    """

    value: float
    against: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One compressed model of one job: where it stands in tables and figures.

    Attributes:
        line: label of its line in the figure and its row in the table.
        x: place on the horizontal axis.
        layers: depth of the model.
        parameters: its size.
        seed: the seeds that its command line set.
        perplexity: on the main text; None where it was not measured.
        dense: perplexity of the dense model, tokens and windows of that text.
        also: perplexity on further texts, by name.
        tasks: accuracy, by what was asked for: a task or a group.
        average: mean accuracy, and retention in place of a difference; None without tasks.
    """

    line: str
    x: str
    layers: int
    parameters: int
    seed: str
    perplexity: Measured | None
    dense: tuple[float, int, int]
    also: dict[str, Measured] = field(default_factory=dict)
    tasks: dict[str, Measured] = field(default_factory=dict)
    average: Measured | None = None


def varying_keys(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys of the command line that the jobs differ in, in its order."""
    keys = dict.fromkeys(key for job in jobs for key in job)
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def label(overrides: Mapping[str, str], keys: Iterable[str]) -> str:
    """A job by what sets it apart from the others."""
    parts = [
        overrides[key] if "." not in key else f"{key.split('.', 1)[1]}={overrides[key]}"
        for key in keys
        if key in overrides
    ]
    return ", ".join(parts) or "all"


def points(row: Row, varying: Sequence[str], x: str) -> list[Point]:
    """One point for every compressed model of a job that was measured.

    Args:
        row: the job.
        varying: keys that the grid's jobs differ in.
        x: the horizontal axis: "parameters", or one of those keys.
    """
    overrides, (dense, *depths) = row["overrides"], row["depths"]
    distilled = "distillation" in row
    line = label(overrides, [k for k in varying if k != x and not k.endswith("seed")])
    text = dense["perplexity"]
    found = []
    for depth in depths:
        tasks = depth.get("zero_shot")
        if not depth["perplexity"] and not tasks:
            continue
        merged = distilled and depth["stage"] == "merged"
        found.append(
            Point(
                line=line + (", merged" if merged else ""),
                x=str(depth["parameters"]) if x == PARAMETERS else _place(overrides.get(x, "")),
                layers=depth["layers"],
                parameters=depth["parameters"],
                seed=", ".join(f"{k}={v}" for k, v in overrides.items() if k.endswith("seed")),
                perplexity=_perplexity(depth["perplexity"]) if depth["perplexity"] else None,
                dense=(round(text["value"], 3), text["tokens"], text["windows"])
                if text
                else (0.0, 0, 0),
                also={name: _perplexity(p) for name, p in depth.get("also", {}).items()},
                tasks=_tasks(tasks, dense["zero_shot"]) if tasks else {},
                average=_average(tasks) if tasks else None,
            )
        )
    return found


def _perplexity(found: Mapping[str, Any]) -> Measured:
    return Measured(found["value"], found["ratio"], found["ratio_low"], found["ratio_high"])


def _tasks(found: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Measured]:
    """What was asked for; a group has no interval of its own."""
    measured = {}
    for name, value in found["values"].items():
        gap = value - dense["values"][name]
        task = found["tasks"].get(name, {"difference_low": gap, "difference_high": gap})
        interval = (task["difference_low"], task["difference_high"])
        measured[name] = Measured(value, gap, *interval)
    return measured


def _average(found: Mapping[str, Any]) -> Measured:
    retention = found["retention"]
    return Measured(found["average"], retention, retention, retention)


def _place(value: str) -> str:
    """A value's place on the axis: itself, or the first layer of a group given by hand."""
    return value.strip("[").split(",")[0] if value.startswith("[[") else value
