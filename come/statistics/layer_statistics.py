"""Streaming statistics of one layer: block influence, and moments of its projections' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from come.models.adapter import ModelAdapter
from come.models.layout import Unit
from come.models.sublayers import watch_features
from come.statistics.influence import TOKENS, block_influence, chosen_tokens, token_cosine
from come.statistics.output_norms import OutputNorms
from come.stream.observer import Update
from come.stream.processes import SINGLE, Processes
from come.stream.token_blocks import TokenBlocks
from come.weak import weak_method

OUTPUT_NORM = "output_norm"


class InputMoments:
    """Running moments of a linear map's input, summed over tokens in float64.

    Args:
        kinds: which moments to accumulate: "abs", "square", "mean".
        width: number of input channels d_in.
    """

    def __init__(self, kinds: Sequence[str], width: int) -> None:
        self.sums = {kind: torch.zeros(width, dtype=torch.float64) for kind in kinds}
        self.tokens = 0
        self._blocks = TokenBlocks(weak_method(self._accumulate))

    def update(self, inputs: Float[Tensor, "*batch width"]) -> None:
        """Adds a batch of inputs; sums within a block of tokens run in float32 or wider."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(flat)
        self._blocks.add(flat)

    def _accumulate(self, flat: Tensor) -> None:
        wide = torch.promote_types(flat.dtype, torch.float32)
        for kind, total in self.sums.items():
            values = {"abs": flat.abs, "square": flat.to(wide).square, "mean": lambda: flat}[kind]()
            total += values.sum(dim=0, dtype=wide).double().cpu()

    def finish(self, processes: Processes = SINGLE) -> None:
        """Adds the tokens of an incomplete block and of other processes, and frees their inputs."""
        self._blocks.finish()
        if self.sums:
            processes.all_reduce(*self.sums.values())
            self.tokens = round(processes.reduced(self.tokens))

    def mean(self, kind: str) -> Float[Tensor, " width"] | None:
        """The mean over tokens of a moment, [d_in] float64; None if it was not accumulated."""
        self.finish()
        return self.sums[kind] / self.tokens if kind in self.sums else None


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer from one pass of the calibration windows.

    Attributes:
        bi: block influence, mean_tokens(1 - clamp(cos(input, output), 0, 1)), in [0, 1].
        moments: moments of the inputs of the sublayers' output projections, by kind of unit.
        output_norms: mean norms of what every unit adds to the output, by kind of unit; empty
            unless they are measured.
    """

    bi: float
    moments: dict[Unit, InputMoments]
    output_norms: dict[Unit, Float[Tensor, " units"]] = field(default_factory=dict)


class StatisticsCollector:
    """Layer observer that gathers `LayerStatistics` in one pass.

    Args:
        adapter: the model.
        kinds: which moments of the output projections' inputs to accumulate: "abs", "square",
            "mean"; and "output_norm" for the norms of what every unit adds.
        tokens: tokens that BI averages over: "all", or the "last" of each window.
        processes: the processes that share the windows.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        kinds: Sequence[str] = (),
        tokens: TOKENS = "all",
        processes: Processes = SINGLE,
    ) -> None:
        self.adapter = adapter
        self.processes = processes
        self.kinds = [kind for kind in kinds if kind != OUTPUT_NORM]
        self.norms = OUTPUT_NORM in kinds
        self.tokens = tokens
        self.found: dict[int, LayerStatistics] = {}

    @contextmanager
    def layer(self, index: int) -> Iterator[Update]:
        """Accumulates the statistics of layer `index` while open."""
        layout, layer = self.adapter.layer_layout(index), self.adapter.layer(index)
        moments = {each.unit: InputMoments(self.kinds, each.width) for each in layout}
        norms = {
            each.unit: OutputNorms(each, self.adapter.output_weight(index, each).detach())
            for each in (layout if self.norms else ())
        }
        influence, count = 0.0, 0

        def accumulate(values: Tensor) -> None:
            nonlocal influence
            influence += values.sum().item()

        blocks = TokenBlocks(accumulate)

        def update(before: Tensor, after: Tensor) -> None:
            nonlocal count
            cosine = token_cosine(
                chosen_tokens(before, self.tokens), chosen_tokens(after, self.tokens)
            )
            blocks.add(block_influence(cosine))
            count += cosine.numel()

        with ExitStack() as hooks:
            for each in layout:
                if self.kinds:
                    see = moments[each.unit].update
                    hooks.enter_context(watch_features(layer, each, see))
                if self.norms:
                    hooks.enter_context(watch_features(layer, each, norms[each.unit].update))
            yield update
        blocks.finish()
        for of_unit in moments.values():
            of_unit.finish(self.processes)
        mean = self.processes.reduced(influence) / self.processes.reduced(count)
        means = {unit: own.finish(self.processes) for unit, own in norms.items()}
        self.found[index] = LayerStatistics(mean, moments, means)
