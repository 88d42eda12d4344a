"""Which differences are real: two models on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
_RESAMPLES = 9999
_BLOCK = 500  # resamples drawn at a time


@dataclass(frozen=True)
class Difference:
    """A model's mean score minus another's, on the same documents.

    Attributes:
        value: the difference.
        low: lower end of its 95% interval, paired bootstrap over documents.
        high: upper end.
        p: McNemar's exact test: probability of a split at least as uneven as the one seen among the
            documents that one model alone gets right, if both were equally good.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def real(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


def mean_difference(
    groups: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]],
) -> tuple[float, float]:
    """95% interval of the mean, over what was asked for, of the difference of two models.

    What was asked for is a task, or a group whose documents all count the same. Documents are drawn
    again within their task.

    Args:
        groups: of each the scores of its tasks, the model's and those it is compared with.
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


def paired_difference(scores: Sequence[float], reference: Sequence[float]) -> Difference:
    """The difference of two models' scores, 0 or 1 a document, with its interval and test.

    Args:
        scores: of the model.
        reference: of the one that it is compared with, in the same order.
    """
    from scipy import stats  # takes a second to import

    gaps = np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float)
    better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    if not gaps.any() or len(gaps) < 2:
        return Difference(float(gaps.mean()), float(gaps.mean()), float(gaps.mean()), p)
    found = stats.bootstrap(
        (gaps,),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(float(gaps.mean()), float(found.low), float(found.high), p)
