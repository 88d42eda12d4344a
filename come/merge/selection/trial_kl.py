"""Change of the model's predictions by a trial merge, also on repeated text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from come.merge.refit.base import Refit
from come.merge.selection.base import SELECTION, SpanScore
from come.merge.selection.cosine import mean_angle
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.trial_layers import TrialLayers
from come.models.layer_state import overlay
from come.models.loss import Predictions, predictions, token_divergence
from come.setting import setting
from come.stream.candidates import Candidate, final_states
from come.stream.stream import LayerStream, Route

REPEAT_WEIGHT = 0.2  # for calibration text sampled from the model


@SELECTION.register
@dataclass(eq=False)
class TrialKL(SpanScore):
    """Merges a shortlist of spans on trial, and takes the one that changes predictions least.

        c = 0:  mean_t KL_t,    x = w
        c > 0:  (1 - c) mean_{t <= s} KL_t + c mean_{t > s} KL_t,    x = (w_1 .. w_s, w_2 .. w_s)
        KL_t = KL( p(. | x_1 .. x_t) || p_merged(. | x_1 .. x_t) )

    p: the current model; w: a calibration window; s: half its tokens. The second half of x repeats
    the first, so c weights how well the merged model still copies. Text sampled from the model
    hardly repeats itself, so c is 0.2 for it (`REPEAT_WEIGHT`). A trial is fitted with the
    surrogate of the refit, and evaluated on windows that it was not fitted to (unless there is only
    one). The shortlist holds the spans with the smallest mean angle between input and output
    (`angular`).

    Source: this project.
    """

    name = "trial_kl"
    paper = ""
    source = "divergence of trial merges"
    scores_sets = True

    shortlist: int = setting(12, "spans that are merged on trial", least=1)
    trial_windows: int = setting(
        16, "calibration windows, from the first, that a trial is fitted to", least=1
    )
    validation_windows: int = setting(
        8,
        "calibration windows, from the last, that score a trial; at most a quarter of all",
        least=1,
    )
    repeat_weight: float = setting(
        0.0, "weight of repeated text in the score", least=0, most=1, config="${repeat_weight:}"
    )
    _windows: Tensor = field(
        init=False, repr=False, default_factory=lambda: torch.empty(0, 0, dtype=torch.int64)
    )
    _once: int = field(init=False, repr=False, default=0)
    _validation: LayerStream | None = field(init=False, repr=False, default=None)
    _reference: list[Predictions] = field(init=False, repr=False, default_factory=list)

    def prepare(self, stream: LayerStream) -> None:
        """Takes the last windows as validation windows."""
        windows = stream.windows[-self._num_validation(stream) :]
        self._once = windows.shape[1] // 2 if self.repeat_weight else windows.shape[1]
        self._windows = repeat_windows(windows) if self.repeat_weight else windows
        self.release()

    def release(self) -> None:
        """Frees the hidden states of the validation windows."""
        super().release()
        self._validation, self._reference = None, []

    def trial_stream(self, stream: LayerStream) -> LayerStream:
        """The first windows, without the validation windows."""
        rest = len(stream.windows) - self._num_validation(stream)
        return stream.head(max(1, min(self.trial_windows, rest)))

    def _num_validation(self, stream: LayerStream) -> int:
        return min(self.validation_windows, -(-len(stream.windows) // 4))

    @property
    def num_trials(self) -> int:
        """The size of the shortlist."""
        return self.shortlist

    def trial_tokens(self, windows: int, seq_len: int) -> tuple[int, int]:
        """Number of tokens that a trial merge is fitted to, and that it is evaluated on."""
        held_out = min(self.validation_windows, -(-windows // 4))
        return max(1, min(self.trial_windows, windows - held_out)) * seq_len, held_out * seq_len

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Mean angle over pi, in [0, 1], which ranks spans for the shortlist."""
        return mean_angle(stream, first, last, self.tokens)

    @torch.no_grad()
    def refine_all(
        self, trials: Iterable[tuple[LayerSpan, UnitAllocation]], refit: Refit
    ) -> list[float]:
        """The divergences, nats per token, >= 0."""
        candidates: list[Candidate] = []
        validation: LayerStream | None = None
        for span, split in trials:
            fitted = fitted_trial(span, split, refit)
            validation = self._validation_stream(span.stream)
            if self.layers is not None:
                self.layers.add(span.first, span.last, fitted)
            states = [states for _, states in validation.through(span.first, fitted)]
            candidates.append(Candidate(span.first, [], span.last + 1, states))
            del span, split, fitted  # frees them before the next trial
        assert validation is not None
        batches = final_states(validation, candidates)
        return [self._divergence(validation, states) for states in batches]

    @torch.no_grad()
    def score_together(
        self, stream: LayerStream, spans: Sequence[tuple[int, int]], layers: TrialLayers
    ) -> float:
        """The divergence with the layers of all trial merges of a set in the model at once."""
        validation = self._validation_stream(stream)
        place, _ = spans[0]
        batches = [validation.boundary(place, rows) for rows in validation.batches]
        for first, last in spans:
            for index in range(place, first):
                batches[:] = [validation.run(index, states) for states in batches]
            for index, layer in layers.route(validation.adapter, first, last):
                batches[:] = [validation.run(index, states, layer) for states in batches]
            place = last + 1
        rest = Candidate(spans[0][0], [], place, batches)
        return self._divergence(validation, final_states(validation, [rest])[0])

    def _validation_stream(self, stream: LayerStream) -> LayerStream:
        """The validation windows in the current model, whose predictions are the reference."""
        if self._validation is None:
            adapter, last = stream.adapter, stream.num_layers - 1
            stream = stream.fork(self._windows, store="memory")
            stream.embed()
            stream.advance(0, last)
            self._validation = stream
            self._reference = [
                predictions(adapter.head, adapter.final_norm(stream.boundary(last + 1, rows)))
                for rows in stream.batches
            ]
        return self._validation

    def _divergence(self, validation: LayerStream, batches: Sequence[Tensor]) -> float:
        adapter, once, gaps_of = validation.adapter, self._once, []
        for reference, states in zip(self._reference, batches, strict=True):
            gaps = token_divergence(adapter.head, reference, adapter.final_norm(states))
            new, again = gaps[:, :once].mean(dim=1), gaps[:, once:].mean(dim=1)
            if once == gaps.shape[1]:  # no repeated text
                again = new
            gaps_of.append((1 - self.repeat_weight) * new + self.repeat_weight * again)
        mean = torch.cat(gaps_of).sum().item() / len(self._windows)
        return mean if math.isnan(mean) else max(0.0, mean)  # rounding can make it negative


def fitted_trial(span: LayerSpan, split: UnitAllocation, refit: Refit) -> Route:
    """The layers that replace a span in a trial merge, fitted with the surrogate of the refit."""
    if not refit.active:
        return span.trial(split)
    sources = span.sources(split)
    fitted = overlay(sources.state, refit.surrogate.solve(span.targets, sources))
    place = span.targets.place
    return [(place, span.stream.adapter.copy_layer(place, fitted))]


def repeat_windows(windows: Int[Tensor, "windows seq"]) -> Int[Tensor, "windows again"]:
    """The first half of every window, then the same tokens again without the first one.

    The first token may be BOS, and models do not look back past a BOS token.
    """
    half = windows.shape[1] // 2
    return torch.cat([windows[:, :half], windows[:, 1:half]], dim=1)
