"""The models of a grid: which line and place each belongs to, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARAMETERS = "parameters"
_SIZES = ("merge.sparsity", "merge.target_layers", "merge.save_at")  # seen on the axis already
_SILENT = ("merge.save_weights", "merge.keep")  # without effect on the result

Row = dict[str, Any]
"""One finished job: `job` (its hash), `overrides` (what its command line set, key to value), and of
its result `method`, `depths` (dense first), `compression`, `merge_history` and, if any,
`distillation`."""


@dataclass(frozen=True)
class Measured:
    """A value of a model, and the dense model's on the same work.

    Attributes:
        value: perplexity, an accuracy, or a speed in tokens/s.
        against: perplexity or speed over the dense model's, or accuracy minus the dense model's.
        low: of the 95% interval of `against`; None where there is none.
        high: of the 95% interval of `against`.
    """

    value: float
    against: float
    low: float | None
    high: float | None


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
        average: mean accuracy; None without tasks.
        retention: that average over the dense model's.
        speed: SpeedResult; None where it was not timed.
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
    retention: float = 0.0
    speed: dict[str, Any] | None = None


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
    depths = depths or [dense]  # merge=none
    unseen = {x, *_SILENT, *(_SIZES if x == PARAMETERS else ())}
    if "merge" in varying and "method" in row:
        overrides = {"merge": row["method"]} | overrides
    line = label(overrides, [k for k in varying if k not in unseen and not k.endswith("seed")])
    text = dense["perplexity"]
    found = []
    for depth in depths:
        tasks = depth.get("zero_shot")
        speed = depth.get("speed")
        if not (depth["perplexity"] or tasks or speed):
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
                tasks=_tasks(tasks) if tasks else {},
                average=_accuracy(tasks["average"], tasks["average_difference"]) if tasks else None,
                retention=tasks["retention"] if tasks else 0.0,
                speed=speed,
            )
        )
    return found


def _perplexity(found: Mapping[str, Any]) -> Measured:
    return Measured(found["value"], found["ratio"], found["ratio_low"], found["ratio_high"])


def _tasks(found: Mapping[str, Any]) -> dict[str, Measured]:
    """What was asked for: tasks and groups."""
    return {
        name: _accuracy(value, found["differences"][name])
        for name, value in found["values"].items()
    }


def _accuracy(value: float, difference: Mapping[str, Any]) -> Measured:
    return Measured(value, difference["value"], difference["low"], difference["high"])


def _place(value: str) -> str:
    """A value's place on the axis: itself, or the first layer of a group given by hand."""
    return value.strip("[").split(",")[0] if value.startswith("[[") else value
