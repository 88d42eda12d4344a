"""Streaming statistics of one layer: block influence and moments of its maps' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.models.adapter import UNITS, ModelAdapter, Unit
from come.statistics.influence import TOKENS, block_influence, chosen_tokens, token_cosine
from come.stream.stream import Update
from come.stream.token_blocks import TokenBlocks


class InputMoments:
    """Running moments of a linear map's input, summed over tokens in float64.

    Args:
        kinds: which of "abs", "square", "mean" to keep.
        width: input channels d_in.
    """

    def __init__(self, kinds: Sequence[str], width: int) -> None:
        self.sums = {kind: torch.zeros(width, dtype=torch.float64) for kind in kinds}
        self.tokens = 0
        self._blocks = TokenBlocks(self._accumulate)

    def update(self, inputs: Float[Tensor, "*batch width"]) -> None:
        """Adds a batch of inputs; within a block of tokens sums run in float32 or wider."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(flat)
        self._blocks.add(flat)

    def _accumulate(self, flat: Tensor) -> None:
        wide = torch.promote_types(flat.dtype, torch.float32)
        for kind, total in self.sums.items():
            values = {"abs": flat.abs, "square": flat.to(wide).square, "mean": lambda: flat}[kind]()
            total += values.sum(dim=0, dtype=wide).double().cpu()

    def mean(self, kind: str) -> Float[Tensor, " width"] | None:
        """The moment, [d_in] float64; None if it was not kept."""
        self._blocks.finish()
        return self.sums[kind] / self.tokens if kind in self.sums else None


@dataclass(frozen=True)
class LayerStatistics:
    """What one pass of the calibration windows says of one layer.

    Attributes:
        bi: block influence, mean_tokens(1 - clamp(cos(input, output), 0, 1)), in [0, 1].
        moments: of the inputs of the two output maps, by kind of unit.
    """

    bi: float
    moments: dict[Unit, InputMoments]


class StatisticsCollector:
    """Layer observer that gathers `LayerStatistics` in one pass.

    Args:
        adapter: the model.
        kinds: which of "abs", "square", "mean" of the output maps' inputs to keep.
        tokens: which tokens count for BI, "all" or "last" of each window.
    """

    def __init__(
        self, adapter: ModelAdapter, kinds: Sequence[str] = (), tokens: TOKENS = "all"
    ) -> None:
        self.adapter = adapter
        self.kinds = kinds
        self.tokens = tokens
        self.found: dict[int, LayerStatistics] = {}

    @contextmanager
    def layer(self, index: int) -> Iterator[Update]:
        """Watches the inputs of layer `index`'s two output maps and its block influence."""
        maps = {unit: self.adapter.output_map(index, unit) for unit in UNITS}
        moments = {unit: InputMoments(self.kinds, maps[unit].in_features) for unit in UNITS}
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
            if self.kinds:
                for unit, linear in maps.items():
                    hooks.enter_context(watch_inputs(linear, moments[unit].update))
            yield update
        blocks.finish()
        self.found[index] = LayerStatistics(influence / count, moments)


@contextmanager
def watch_inputs(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `see` with every input of `module` while open."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
