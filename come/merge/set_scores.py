"""Scores of whole sets of spans, merged together by the layers that their trial merges fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from come.merge.trial_layers import TrialLayers
from come.progress import ProgressBar

if TYPE_CHECKING:
    from come.merge.search import Search

Bounds = tuple[int, int]  # first and last layer


class SetScores:
    """Scores sets of spans of the search's current model. Its trial merges keep their layers.

    Every layer was fitted to the inputs that it has in the dense model, so a set is scored without
    another fit: by one pass of the validation windows.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        trials = search.trials
        folder, kept = search.stream.folder, None
        if trials.path is not None:  # an interrupted search goes on with them, as with its scores
            folder, kept = trials.path.parent, f"{trials.job}-{search.plan.hash}"
        self._layers = TrialLayers(folder, kept)
        search.method.selection.layers = self._layers

    def scored(self, sets: Sequence[Sequence[Bounds]]) -> list[float]:
        """Scores of the sets, spans ascending. That of one span is the score of its trial merge."""
        search = self._search
        plan, wanted = search.plan.hash, [tuple(spans) for spans in sets]
        missing = [s for s in dict.fromkeys(wanted) if search.trials.get(plan, *s) is None]
        with ProgressBar(total=len(missing), desc="sets", shown=search.stream.progress) as bar:
            count = search.stream.processes.count
            for some in (missing[i : i + count] for i in range(0, len(missing), count)):
                found = search.measured(some, self._own)
                search.trials.add(plan, dict(zip(some, found, strict=True)))
                bar.update(len(some))
        scores = [search.trials.get(plan, *spans) for spans in wanted]
        return [score for score in scores if score is not None]

    def _own(self, sets: Sequence[Sequence[Bounds]]) -> list[float]:
        """Scores by this process, which fits layers of which it has only the scores."""
        search, selection = self._search, self._search.method.selection
        for span in dict.fromkeys(span for spans in sets for span in spans):
            if span not in self._layers:
                search.trial_scores([(*span, None)])
        stream = search.stream.unshared()
        return [selection.score_together(stream, spans, self._layers) for spans in sets]
