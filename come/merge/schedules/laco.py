"""LaCo's schedule: walks down from the last layers, and merges where the output hardly changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from come.merge.plan import SpanCandidate
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.search import Choice, Search
from come.setting import setting
from come.statistics.influence import token_cosine


@SCHEDULES.register
@dataclass(eq=False)
class LaCo(Schedule):
    """Walks down from the last layers and keeps a merge if the model's output stays similar.

        at l: merge layers l .. l + m - 1 on trial;  s = mean_tokens cos(trial's h_L, dense h_L)
        s > threshold: keep it, l <- l - interval;   else l <- l - 1

    where l .. l + m - 1 must be layers of the model. h_L: hidden states before the final norm.

    Source: arXiv 2402.11187, Algorithm 1. Differs from the paper in that the depth is given: the
    paper fixes the threshold and takes the resulting depth. Here the walk stops at the target, its
    last span may be smaller, and a walk that ends above the target starts again with the threshold
    lowered by `relax`.
    """

    name = "laco"
    paper = "2402.11187"
    source = "LaCo, Algorithm 1"
    restarts = True
    trials = True
    nested = False
    uses_scores = False
    reads_selection = False

    threshold: float = setting(0.65, "similarity above which a merge is kept")
    interval: int = setting(2, "layers that the walk goes down after a merge", least=1)
    relax: float = setting(0.05, "how much the threshold falls between walks", above=0)
    trial_windows: int = setting(4, "calibration windows that score a trial", least=1)
    _dense: torch.Tensor | None = field(init=False, repr=False, default=None)
    _batches: int = field(init=False, repr=False, default=0)
    _position: int | None = field(init=False, repr=False, default=None)

    def choose(self, search: Search) -> Choice:
        """The next span that passes the trial; candidates hold 1 - s of all spans tried."""
        if self._dense is None:
            depth = search.stream.num_layers
            self._batches = -(-self.trial_windows // search.stream.batch_size)
            states = search.stream.through(depth, [], self._batches)
            self._dense = torch.cat([batch.cpu() for _, batch in states])[: self.trial_windows]
        spans = search.rules.spans(search.history, search.target)
        size = spans[0][1] - spans[0][0] + 1
        tried: dict[tuple[int, int], float] = {}
        while True:
            top = len(search.history) - size
            if self._position is None:
                self._position = top
            self._position = min(self._position, top)
            while self._position >= 0:
                span = (self._position, self._position + size - 1)
                if span in spans:
                    if span not in tried:
                        tried[span] = self._similarity(search, *span)
                    if tried[span] > self.threshold:
                        self._position -= self.interval
                        candidates = [SpanCandidate(*s, 1 - value) for s, value in tried.items()]
                        return Choice(*search.rules.removal(*span), 1 - tried[span], candidates)
                self._position -= 1
            self.threshold -= self.relax
            if self.threshold < -1:
                raise ValueError(
                    "merge.schedule=laco: no trial gives hidden states that are finite; "
                    "try model.dtype=float32 or bfloat16"
                )
            self._position = None

    def _similarity(self, search: Search, first: int, last: int) -> float:
        """Mean cosine between the last hidden states of the trial and of the dense model."""
        stream = search.stream
        first, last, kept = search.rules.removal(first, last)
        span = search.span(first, last)
        downstream = stream.route(span.last + 1, stream.num_layers - 1)
        route = [*span.trial(search.split(span, kept)), *downstream]
        trial = stream.through(span.first, route, self._batches)
        states = torch.cat([batch.cpu() for _, batch in trial])[: self.trial_windows]
        assert self._dense is not None
        return token_cosine(states, self._dense).mean().item()
