"""The models of a sweep: their position in tables and figure, and their measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from come.evaluate.base import Metric, Metrics, read_metrics
from come.renamed import current_keys

PARAMETERS = "parameters"
_SIZES = (  # the x axis shows the size
    *("merge.sparsity", "merge.target_layers", "merge.save_at"),
    *("merge.budget.parameters", "merge.budget.latency"),
)
_NO_EFFECT = ("merge.save_weights",)  # has no effect on the measurements

Row = dict[str, Any]
"""One finished job: `job` (its hash), `overrides` (of its command line, key to value), and from its
result `method`, `depths` (dense first), `compression`, `merge_history` and, if any, `distillation`.
"""


def check_depths(depths: Any) -> None:
    """Checks the models of a result, which may be damaged or of a stranger.

    Raises:
        ValueError: there are none, or one is not described as in `come.records.DepthResult`.
    """
    if not isinstance(depths, list) or not depths:
        raise ValueError("there are no models in it")
    for depth in depths:
        for key, kind in (("layers", int), ("parameters", int), ("stage", str), ("metrics", dict)):
            if key in depth and not isinstance(depth[key], kind):
                raise ValueError(f"{key} of a model is {depth[key]!r:.60}")
        if not isinstance(depth["layers"], int):
            raise ValueError("a model has no number of layers")  # noqa: TRY004
        read_metrics(depth["metrics"])


@dataclass(frozen=True)
class ModelRecord:
    """One model of one job: its position in tables and figure, and its measurements.

    Attributes:
        line: label of its line in the figure and of its row in the tables.
        x: position on the horizontal axis, as text.
        layers: depth of the model.
        parameters: number of parameters.
        seed: the seeds that the command line sets, such as "merge.selection.seed=1".
        metrics: metrics of the model, by name.
        dense: metrics of the dense model, by name.
    """

    line: str
    x: str
    layers: int
    parameters: int
    seed: str
    metrics: Metrics
    dense: Metrics = field(default_factory=dict)

    @property
    def perplexity(self) -> Metric | None:
        """Perplexity on the main text; None if not measured."""
        return self.metrics.get("perplexity")

    @property
    def text(self) -> tuple[float, str]:
        """Perplexity of the dense model on the main text, and the text's description."""
        dense = self.dense["perplexity"]
        return round(dense.value, 3), dense.data


def varying_keys(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Override keys whose values differ between the jobs, in order of first appearance.

    Former keys of settings are replaced by the current ones, here and in `model_records`.
    """
    jobs = [current_keys(job) for job in jobs]
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


def model_records(row: Row, varying: Sequence[str], x: str) -> list[ModelRecord]:
    """One record for every measured model of a job.

    The dense model has a record only with `merge=none`.

    Args:
        row: the job.
        varying: override keys that vary over the jobs of the sweep.
        x: horizontal axis: "parameters", or an override key.
    """
    overrides, (dense, *depths) = current_keys(row["overrides"]), row["depths"]
    distilled = "distillation" in row
    depths = depths or [dense]  # merge=none
    unseen = {x, *_NO_EFFECT, *(_SIZES if x == PARAMETERS else ())}
    if "merge" in varying and "method" in row:
        overrides = {"merge": row["method"]} | overrides
    line = label(overrides, [k for k in varying if k not in unseen and not k.endswith("seed")])
    reference = read_metrics(dense["metrics"])
    found = []
    for depth in depths:
        if not depth["metrics"]:
            continue
        merged = distilled and depth["stage"] == "merged"
        found.append(
            ModelRecord(
                line=line + (", merged" if merged else ""),
                x=str(depth["parameters"]) if x == PARAMETERS else _place(overrides.get(x, "")),
                layers=depth["layers"],
                parameters=depth["parameters"],
                seed=", ".join(f"{k}={v}" for k, v in overrides.items() if k.endswith("seed")),
                metrics=read_metrics(depth["metrics"]),
                dense=reference,
            )
        )
    return found


def _place(value: str) -> str:
    """Position of a value on the axis: itself, or for `merge.groups` the first layer listed."""
    return value.strip("[").split(",")[0] if value.startswith("[[") else value
