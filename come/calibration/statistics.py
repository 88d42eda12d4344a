"""Streaming statistics of one layer: block influence and unit scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.calibration.influence import TOKENS, block_influence, chosen_tokens, token_cosine
from come.calibration.stream import Update
from come.models.adapter import UNITS, ModelAdapter, Unit
from come.models.surgery import Span
from come.sensitivity.base import MapStatistics, SensitivityMetric


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one layer.

    Attributes:
        bi: block influence, mean_tokens(1 - clamp(cos(input, output), 0, 1)), in [0, 1].
        scores: sensitivity of every unit, by kind, [units] float64: of an FFN channel its own,
            of a KV group the mean over the head outputs of its query heads.
    """

    bi: float
    scores: dict[Unit, Float[Tensor, " units"]]


class InputMoments:
    """Running moments of a linear map's input, summed over tokens in float64.

    Args:
        kinds: which of "abs", "square", "mean" to keep.
        width: input channels d_in.
    """

    def __init__(self, kinds: Sequence[str], width: int) -> None:
        self.sums = {kind: torch.zeros(width, dtype=torch.float64) for kind in kinds}
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "*batch width"]) -> None:
        """Adds a batch of inputs; within the batch sums run in float32 or wider."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        wide = torch.promote_types(flat.dtype, torch.float32)
        for kind, total in self.sums.items():
            values = {"abs": flat.abs, "square": flat.to(wide).square, "mean": lambda: flat}[kind]()
            total += values.sum(dim=0, dtype=wide).double().cpu()
        self.tokens += len(flat)

    def mean(self, kind: str) -> Float[Tensor, " width"] | None:
        """The moment, [d_in] float64; None if it was not kept."""
        return self.sums[kind] / self.tokens if kind in self.sums else None


class StatisticsCollector:
    """Layer observer that gathers `LayerStatistics` in one pass.

    Args:
        adapter: the model.
        metric: the channel metric.
        tokens: which tokens count for BI, "all" or "last" of each window.
    """

    def __init__(
        self, adapter: ModelAdapter, metric: SensitivityMetric, tokens: TOKENS = "all"
    ) -> None:
        self.adapter = adapter
        self.metric = metric
        self.tokens = tokens
        self.spans: list[Span] = []
        self.found: dict[int, LayerStatistics] = {}

    @contextmanager
    def layer(self, index: int) -> Iterator[Update]:
        """Watches the inputs of layer `index`'s two output maps and its block influence."""
        maps = {unit: self.adapter.output_map(index, unit) for unit in UNITS}
        moments = {
            unit: InputMoments(self.metric.moments, linear.in_features)
            for unit, linear in maps.items()
        }
        influence, count = 0.0, 0

        def update(before: Tensor, after: Tensor) -> None:
            nonlocal influence, count
            cosine = token_cosine(
                chosen_tokens(before, self.tokens), chosen_tokens(after, self.tokens)
            )
            influence += block_influence(cosine).sum().item()
            count += cosine.numel()

        with ExitStack() as hooks:
            for unit, linear in maps.items():
                hooks.enter_context(_watch(linear, moments[unit]))
            yield update
        scores = {
            unit: self._unit_scores(index, unit, linear, moments[unit])
            for unit, linear in maps.items()
        }
        self.found[index] = LayerStatistics(influence / count, scores)

    def _unit_scores(
        self, index: int, unit: Unit, linear: nn.Linear, moments: InputMoments
    ) -> Float[Tensor, " units"]:
        span = self.spans[index] if self.spans else [index]
        columns = self.metric.score(
            MapStatistics(
                weight=linear.weight.detach(),
                tokens=moments.tokens,
                key=f"{span[0]}-{span[-1]}/{unit}",
                abs_mean=moments.mean("abs"),
                square_mean=moments.mean("square"),
                mean=moments.mean("mean"),
            )
        )
        return columns.cpu().view(-1, self.adapter.columns_per_unit(unit)).mean(dim=1)


@contextmanager
def _watch(linear: nn.Linear, moments: InputMoments) -> Iterator[None]:
    """Adds every input of `linear` to `moments` while open."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.update(inputs[0])

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
