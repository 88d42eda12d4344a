"""Confidence intervals, and paired tests of two models on the same windows or documents."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
_RESAMPLES = 9999
_BLOCK = 500  # resamples per batch, to bound memory


@dataclass(frozen=True)
class Relative:
    """A metric of a model compared with the same metric of another, usually the dense model.

    Attributes:
        value: ratio of the two values, or their difference; see `Metric.comparison`.
        low: lower end of its 95% confidence interval; None if there is none.
        high: upper end of that interval; None if there is none.
        p: two-sided p-value of McNemar's exact test: the probability, if both models are equally
            good, of a split at least as uneven as the observed one among the documents that only
            one of the models answers correctly. None if the samples are not scores of documents.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def __str__(self) -> str:
        shown = f"{self.value:.4g}"
        return shown if self.low is None else f"{shown} [{self.low:.4g}, {self.high:.4g}]"


def exp_interval(values: Sequence[float]) -> Relative:
    """Exp of a mean and of the ends of its Student's t interval.

    Results above the largest float are clipped to it. The interval of a single value is
    [0, infinity].
    """
    from scipy import stats  # takes a second to import

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Relative(_exp(mean), 0.0, math.inf)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * spread
    return Relative(_exp(mean), _exp(mean - half), _exp(mean + half))


def _exp(value: float) -> float:
    """Exp, clipped to the largest float."""
    return math.exp(value) if value < math.log(sys.float_info.max) else sys.float_info.max


def mean_difference(
    groups: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]],
) -> tuple[float, float]:
    """95% confidence interval of the mean difference of two models over several groups of tasks.

    The difference of a group is the mean over the documents of all its tasks; groups have equal
    weight. The paired bootstrap resamples documents within their task.

    Args:
        groups: for each group, the pairs (scores of the model, scores of the reference model) of
            its tasks. A single task is a group with one pair.

    Returns:
        Lower and upper end of the interval.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(_RESAMPLES)
    for tasks in groups:
        gaps = [np.subtract(own, other, dtype=float) for own, other in tasks]
        total = sum(len(gap) for gap in gaps)
        for gap in gaps:
            for first in range(0, _RESAMPLES, _BLOCK):
                count = min(_BLOCK, _RESAMPLES - first)
                drawn = gap[generator.integers(len(gap), size=(count, len(gap)))]
                means[first : first + count] += drawn.sum(axis=1) / total / len(groups)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def paired_difference(scores: Sequence[float], reference: Sequence[float]) -> Relative:
    """The mean difference of two models' scores, with its bootstrap interval and McNemar's test.

    For scores other than 0 and 1, the test is the sign test of which model scores higher.

    Args:
        scores: score of the model on every document.
        reference: score of the reference model on the same documents, in the same order.
    """
    from scipy import stats  # takes a second to import

    gaps = np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float)
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    if not gaps.any() or len(gaps) < 2:
        return Relative(float(gaps.mean()), float(gaps.mean()), float(gaps.mean()), p)
    found = stats.bootstrap(
        (gaps,),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Relative(float(gaps.mean()), float(found.low), float(found.high), p)
