"""What a merge does to the model's predictions, where they copy too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from come.merge.refit.base import Refit
from come.merge.selection.angular import Angular
from come.merge.selection.base import SELECTION, GroupScore
from come.merge.span import Group, UnitAllocation
from come.models.loss import Predictions, predictions, token_divergence
from come.statistics.influence import TOKENS
from come.stream.stream import LayerStream


@SELECTION.register
class TrialKL(GroupScore):
    """Merges a shortlist of groups on trial, and takes the one that changes predictions least.

        c = 0:  mean_t KL_t,    x = w
        c > 0:  (1 - c) mean_{t <= s} KL_t + c mean_{t > s} KL_t,    x = (w_1 .. w_s, w_2 .. w_s)
        KL_t = KL( p(. | x_1 .. x_t) || p_merged(. | x_1 .. x_t) )

    p: the model as it is; w: a calibration window; s: half its tokens. Behind s everything has been
    said before, so a group that looks back and copies shows as one. Text that hardly repeats itself
    would not tell that: with text from the model `python run.py` takes c = 0.2 (in Python:
    `Recipe.come_plus(options=TrialKL.sampled_options)`). A trial is fitted with what stands in for
    the refit, and judged on windows that it was not fitted to (a single calibration window does
    both). Behind a merge, the model as it is is the merged one. The shortlist are the groups with
    the least mean angle between input and output (`angular`).

    Source: this project.

    Args:
        tokens: which tokens the angle reads, "all" or "last" of each window.
        shortlist: how many groups are tried, at least.
        trial_windows: calibration windows, from the first, that a trial is fitted to, at most.
        judge_windows: calibration windows, from the last, that it is judged on; a quarter of all
            at most, rounded up.
        copying: the weight c of what has been said before, in [0, 1]; with 0 nothing is said twice.
    """

    name = "trial_kl"
    paper = ""
    source = "divergence of trial merges"
    sampled_options: ClassVar[Mapping[str, float]] = {"copying": 0.2}
    shortlist = 14

    def __init__(
        self,
        tokens: TOKENS = "all",
        shortlist: int = 14,
        trial_windows: int = 16,
        judge_windows: int = 8,
        copying: float = 0.0,
    ) -> None:
        self.angle = Angular(tokens)
        numbers = {
            "shortlist": shortlist,
            "trial_windows": trial_windows,
            "judge_windows": judge_windows,
        }
        for key, value in numbers.items():
            if value < 1:
                raise ValueError(f"merge.options.{key}={value}: must be at least 1")
        if not 0 <= copying <= 1:
            raise ValueError(f"merge.options.copying={copying}: must be in [0, 1]")
        self.copying = copying
        self.shortlist = shortlist
        self.trial_windows = trial_windows
        self.judge_windows = judge_windows
        self._windows = torch.empty(0, 0, dtype=torch.int64)
        self._once = 0
        self._judge: LayerStream | None = None
        self._wanted: list[Predictions] = []

    def prepare(self, stream: LayerStream) -> None:
        """Sets the judging windows apart."""
        windows = stream.windows[-self._judging(stream) :]
        self._once = windows.shape[1] // 2 if self.copying else windows.shape[1]
        self._windows = repeat_windows(windows) if self.copying else windows
        self.release()

    def release(self) -> None:
        """Frees the states of the judging windows."""
        self._judge, self._wanted = None, []

    def trial_stream(self, stream: LayerStream) -> LayerStream:
        """The first windows, without those that judge."""
        rest = len(stream.windows) - self._judging(stream)
        return stream.head(max(1, min(self.trial_windows, rest)))

    def _judging(self, stream: LayerStream) -> int:
        return min(self.judge_windows, -(-len(stream.windows) // 4))

    def score(self, stream: LayerStream, first: int, last: int) -> float:
        """Mean angle over pi, in [0, 1]: what makes the shortlist."""
        return self.angle.score(stream, first, last)

    @torch.no_grad()
    def refine(self, group: Group, split: UnitAllocation, refit: Refit) -> float:
        """The divergence, nats a token, >= 0."""
        stream, adapter = group.stream, group.stream.adapter
        if refit.active:
            assert group.goals is not None
            pieces = group.pieces(split)
            fitted = pieces.state | refit.surrogate.solve(group.goals(), pieces)
            layer = adapter.copy_layer(group.first, fitted)
            route = [(group.first, layer), *stream.route(group.last + 1, stream.num_layers - 1)]
        else:
            route = list(group.full_route(split))
        if self._judge is None:
            self._judge = stream.fork(self._windows, store="memory")
            self._judge.embed()
            self._judge.advance(0, stream.num_layers - 1)
            self._wanted = [
                predictions(
                    adapter.head, adapter.final_norm(self._judge.boundary(stream.num_layers, rows))
                )
                for rows in self._judge.batches
            ]
        total, once = 0.0, self._once
        for wanted, (_, states) in zip(
            self._wanted, self._judge.through(group.first, route), strict=True
        ):
            gaps = token_divergence(adapter.head, wanted, adapter.final_norm(states))
            new, again = gaps[:, :once].mean(dim=1), gaps[:, once:].mean(dim=1)
            if once == gaps.shape[1]:  # nothing is said twice
                again = new
            total += ((1 - self.copying) * new + self.copying * again).sum().item()
        mean = total / len(self._windows)
        return mean if math.isnan(mean) else max(0.0, mean)  # rounding can leave it a little below


def repeat_windows(windows: Int[Tensor, "windows seq"]) -> Int[Tensor, "windows again"]:
    """The first half of every window, and once more but for its first token.

    That token may be the one that begins a text, and what stands before that is not looked back to.
    """
    half = windows.shape[1] // 2
    return torch.cat([windows[:, :half], windows[:, 1:half]], dim=1)
