"""The models of a sweep: their position in tables and figure, and their measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARAMETERS = "parameters"
_SIZES = ("merge.sparsity", "merge.target_layers", "merge.save_at")  # the x axis shows the size
_SILENT = ("merge.save_weights", "merge.keep")  # have no effect on the measurements

Row = dict[str, Any]
"""One finished job: `job` (its hash), `overrides` (of its command line, key to value), and from its
result `method`, `depths` (dense first), `compression`, `merge_history` and, if any, `distillation`.
"""


@dataclass(frozen=True)
class Measured:
    """A measured value of a model, and its comparison with the dense model on the same data.

    Attributes:
        value: perplexity or accuracy.
        against: ratio to the dense model's perplexity, or difference to its accuracy.
        low: lower end of the 95% confidence interval of `against`; None if there is none.
        high: upper end of that interval; None if there is none.
    """

    value: float
    against: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Point:
    """One model of one job: its position in tables and figure, and its measurements.

    Attributes:
        line: label of its line in the figure and of its row in the tables.
        x: position on the horizontal axis, as text.
        layers: depth of the model.
        parameters: number of parameters.
        seed: the seeds that the command line sets, such as "merge.selection.seed=1".
        perplexity: perplexity on the main text; None if not measured.
        dense: perplexity of the dense model, and numbers of tokens and windows of the main text;
            zeros if not measured.
        also: perplexity on the texts of `eval.extra_texts`, by name.
        tasks: accuracy by name of the requested task or group.
        average: mean accuracy; None without tasks.
        retention: average accuracy divided by the dense model's.
        speed: a `SpeedResult`; None if not timed.
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
    """Override keys whose values differ between the jobs, in order of first appearance."""
    keys = dict.fromkeys(key for job in jobs for key in job)
    return [key for key in keys if len({job.get(key) for job in jobs}) > 1]


def label(overrides: Mapping[str, str], keys: Iterable[str]) -> str:
    """Label of a job: its values for `keys`, which distinguish it from the other jobs."""
    parts = [
        overrides[key] if "." not in key else f"{key.split('.', 1)[1]}={overrides[key]}"
        for key in keys
        if key in overrides
    ]
    return ", ".join(parts) or "all"


def points(row: Row, varying: Sequence[str], x: str) -> list[Point]:
    """One point for every compressed model of a job that was measured.

    With `merge=none`, the only point is the dense model.

    Args:
        row: the job.
        varying: override keys that vary over the jobs of the sweep.
        x: horizontal axis: "parameters", or an override key.
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
    """Accuracy of the requested tasks and groups, by name."""
    return {
        name: _accuracy(value, found["differences"][name])
        for name, value in found["values"].items()
    }


def _accuracy(value: float, difference: Mapping[str, Any]) -> Measured:
    return Measured(value, difference["value"], difference["low"], difference["high"])


def _place(value: str) -> str:
    """Position of a value on the axis: itself, or for `merge.groups` the first layer listed."""
    return value.strip("[").split(",")[0] if value.startswith("[[") else value
