"""Compares two runs on the same text and documents: python -m come.report.pair RUN OTHER."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from come.errors import one_line
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Metrics, read_metrics
from come.files import DAMAGED, RESULT, read_object
from come.records import Result
from come.report.numbers import plain_value, relative
from come.report.records import check_depths
from come.report.tables import Table

HEAD = ["layers", "measured", "run", "other", "run against other [95%]", "McNemar's p"]
SAME = 0.05  # nats; a dense model's loss on a window may differ this much, for example by dtype


def compare(run: Result, other: Result) -> Table:
    """Compares the results of two runs at every depth that both have.

    Perplexity is compared by the ratio run / other, with Student's t interval over windows.
    Accuracy is compared by the difference run - other, with the paired bootstrap interval over
    documents and McNemar's exact test. Speeds of different runs are not compared. If a depth has
    both a merged and a distilled model, the distilled model is used.

    Raises:
        ValueError: the runs share no metric, or used different windows or documents.
    """
    models, other_models = _models(run), _models(other)
    rows = []
    for layers in sorted(set(models) & set(other_models), reverse=True):
        own, its = models[layers], other_models[layers]
        for name, (first, second) in _shared(own, its).items():
            _check_samples(name, first, second, run, other)
            for key, metric in _evaluation(name).compare(first, second).items():
                p = metric.relative.p if metric.relative else None
                shown = [plain_value(metric), plain_value(second[key]), relative(metric)]
                rows.append([str(layers), key, *shown, "" if p is None else f"{p:.3f}"])
    if not rows:
        raise ValueError(
            f"nothing to compare: the runs have {_depths(models)} and {_depths(other_models)} "
            "layers, and at no common depth did both measure perplexity, or both accuracy"
        )
    return Table(HEAD, rows, labels=2)


def _models(result: Result) -> dict[int, Metrics]:
    """Metrics of the compressed models by depth; of the last one if a depth has several."""
    return {depth["layers"]: read_metrics(depth["metrics"]) for depth in result["depths"][1:]}


def _depths(models: dict[int, Metrics]) -> str:
    """The depths of the models as text."""
    return ", ".join(map(str, models)) or "no"


def _evaluation(name: str) -> type[Evaluation]:
    return EVALUATIONS.get(name) if name in EVALUATIONS.names() else Evaluation


def _shared(own: Metrics, its: Metrics) -> dict[str, tuple[Metrics, Metrics]]:
    """The metrics that can be compared, by evaluation; groups of tasks only if they are equal."""
    shared: dict[str, tuple[Metrics, Metrics]] = {}
    for key, metric in own.items():
        name = key.partition("/")[0]
        if key not in its or not metric.comparison or _evaluation(name).together:
            continue
        if metric.details.get("groups") != its[key].details.get("groups"):
            continue
        first, second = shared.setdefault(name, ({}, {}))
        first[key], second[key] = metric, its[key]
    return shared


def _check_samples(name: str, own: Metrics, its: Metrics, run: Result, other: Result) -> None:
    """Raises ValueError if the runs used different windows or documents."""
    for key, metric in own.items():
        counts = len(metric.samples), len(its[key].samples)
        if metric.comparison == "ratio":
            first, second = (_dense_samples(result, key) for result in (run, other))
            same = counts[0] == counts[1] and len(first) == len(second)
            if not same or any(abs(a - b) > SAME for a, b in zip(first, second, strict=True)):
                raise ValueError(
                    f"the runs measured {key} on other windows, as the dense model's show: "
                    f"evaluate both with the same eval.{name}.path, text_range, seq_len and "
                    "max_tokens"
                )
        elif counts[0] != counts[1]:
            raise ValueError(
                f"{key} has {counts[0]} and {counts[1]} documents: evaluate both with the same "
                f"eval.{name}.limit"
            )


def _dense_samples(result: Result, key: str) -> Sequence[float]:
    record = result["depths"][0]["metrics"].get(key)
    return Metric.read(record).samples if record else []


def _read(folder: Path) -> Result:
    path = folder / RESULT if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"{path} is not there; a finished run writes it")
    try:
        result = read_object(path)
        earlier = any("metrics" not in depth for depth in result["depths"])
        if not earlier:
            check_depths(result["depths"])
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a result: {one_line(error)}") from error
    if earlier:
        raise ValueError(
            f"{path} is of an earlier version; measure its models again with from_run={folder}"
        )
    return cast(Result, result)


def main() -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m come.report.pair", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("other", type=Path, help="the one it is compared with")
    arguments = parser.parse_args()
    try:
        table = compare(_read(arguments.run), _read(arguments.other))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table.markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
