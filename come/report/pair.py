"""Compares two runs on the same text and documents: python -m come.report.pair RUN OTHER."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import cast

from come.evaluate.paired import mean_difference, paired_difference
from come.evaluate.perplexity import Perplexity
from come.files import RESULT
from come.records import DepthResult, PerplexityResult, Result, ZeroShotResult
from come.report.numbers import number
from come.report.tables import Table

Scores = tuple[list[float], list[float]]

HEAD = ["layers", "measured", "run", "other", "run against other", "McNemar's p"]
SAME = 0.05  # nats; a dense model's loss on a window may differ this much, for example by dtype


def compare(run: Result, other: Result) -> Table:
    """Compares the results of two runs at every depth that both have.

    Perplexity is compared by the ratio run / other, with Student's t interval over windows.
    Accuracy is compared by the difference run - other, with the paired bootstrap interval over
    documents and McNemar's exact test. All intervals are 95% confidence intervals. If a depth has
    both a merged and a distilled model, the distilled model is used.

    Raises:
        ValueError: the runs share no measurement, or used different windows or documents.
    """
    mine, theirs = _models(run), _models(other)
    rows = []
    for layers in sorted(set(mine) & set(theirs), reverse=True):
        own, its = mine[layers], theirs[layers]
        if own["perplexity"] and its["perplexity"]:
            _check_windows(run, other)
            rows.append([str(layers), *_perplexity(own["perplexity"], its["perplexity"])])
        if own["zero_shot"] and its["zero_shot"]:
            accuracies = _accuracies(own["zero_shot"], its["zero_shot"])
            rows += [[str(layers), *cells] for cells in accuracies]
    if not rows:
        raise ValueError(
            f"nothing to compare: the runs have {_told(mine)} and {_told(theirs)} layers, and at "
            "no common depth did both measure perplexity, or both accuracy"
        )
    return Table(HEAD, rows, labels=2)


def _models(result: Result) -> dict[int, DepthResult]:
    """The compressed models by depth; the last one if a depth has several."""
    return {depth["layers"]: depth for depth in result["depths"][1:]}


def _told(models: dict[int, DepthResult]) -> str:
    return ", ".join(map(str, models)) or "no"


def _check_windows(run: Result, other: Result) -> None:
    dense = [result["depths"][0]["perplexity"] for result in (run, other)]
    own, its = (found["nll"] if found else [] for found in dense)
    if len(own) != len(its) or any(abs(a - b) > SAME for a, b in zip(own, its, strict=True)):
        raise ValueError(
            "the runs measured perplexity on other windows, as the dense model's show: evaluate "
            "both with the same eval.path, eval.text_range, eval.seq_len and eval.max_tokens"
        )


def _perplexity(own: PerplexityResult, its: PerplexityResult) -> list[str]:
    pair = [Perplexity(tuple(found["nll"]), found["tokens"], 0) for found in (own, its)]
    ratio = pair[0].ratio_to(pair[1])
    gap = f"{number(ratio.value, 3)} x [{number(ratio.low, 3)}, {number(ratio.high, 3)}]"
    return ["perplexity", number(own["value"], 2), number(its["value"], 2), gap, ""]


def _accuracies(own: ZeroShotResult, its: ZeroShotResult) -> Iterator[list[str]]:
    """Rows for each task of both runs, and for the mean of two or more tasks with scores."""
    pairs: list[list[Scores]] = []
    for name in own["tasks"]:
        if name not in its["tasks"]:
            continue
        mine, theirs = (found["tasks"][name].get("scores", []) for found in (own, its))
        if mine is None or theirs is None:
            first, second = own["tasks"][name]["value"], its["tasks"][name]["value"]
            yield [name, f"{first:.3f}", f"{second:.3f}", f"{first - second:+.3f}", ""]
            continue
        if not mine or len(mine) != len(theirs):
            raise ValueError(
                f"{name} was asked {len(mine)} and {len(theirs)} documents (0: by a version that "
                "kept no scores): evaluate both again with the same eval.limit"
            )
        pairs.append([(mine, theirs)])
        gap = paired_difference(mine, theirs)
        difference = _interval(gap.value, gap.low, gap.high)
        yield [name, f"{fmean(mine):.3f}", f"{fmean(theirs):.3f}", difference, f"{gap.p:.3f}"]
    if len(pairs) > 1:
        first, second = (fmean(fmean(pair[0][side]) for pair in pairs) for side in (0, 1))
        difference = _interval(first - second, *mean_difference(pairs))
        yield ["mean", f"{first:.3f}", f"{second:.3f}", difference, ""]


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _read(folder: Path) -> Result:
    path = folder / RESULT if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"{path} is not there; a finished run writes it")
    return cast(Result, json.loads(path.read_text()))


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
