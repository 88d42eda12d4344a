"""Mean norms of what the units of a sublayer add to its output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from come.models.units import Sublayer
from come.stream.processes import SINGLE, Processes
from come.stream.token_blocks import TokenBlocks
from come.weak import weak_method


class OutputNorms:
    """Running mean over tokens of |W_u f_u|_2, for every unit u of a sublayer.

    The tokens of an expert are those that are routed to it: its features include its routing
    weight, so they are zero for all others. Other units act on every token.

    Args:
        sublayer: the sublayer.
        weight: its output projection W, whose columns of a unit are adjacent.
    """

    def __init__(self, sublayer: Sublayer, weight: Float[Tensor, "out in"]) -> None:
        self._routed = any(part.experts for part in sublayer.parts)
        self._columns = sublayer.columns
        self._weight: Tensor | None = weight
        self._sums = torch.zeros(2, sublayer.count, dtype=torch.float64)  # norms, tokens
        self._blocks = TokenBlocks(weak_method(self._accumulate))

    def update(self, features: Float[Tensor, "*batch width"]) -> None:
        """Adds a batch of the output projection's inputs; norms are in float32 or wider."""
        self._blocks.add(features.reshape(-1, features.shape[-1]))

    def _accumulate(self, flat: Tensor) -> None:
        assert self._weight is not None
        wide = torch.promote_types(flat.dtype, torch.float32)
        if self._columns == 1:
            norms = flat.to(wide).abs() * self._weight.to(wide).norm(dim=0)
            active = flat != 0
        else:
            units = zip(
                flat.split(self._columns, 1), self._weight.split(self._columns, 1), strict=True
            )
            pairs = [(own, (own.to(wide) @ weight.T.to(wide)).norm(dim=1)) for own, weight in units]
            norms = torch.stack([norm for _, norm in pairs], dim=1)
            active = torch.stack([(own != 0).any(dim=1) for own, _ in pairs], dim=1)
        counted = active if self._routed else torch.ones_like(active)
        self._sums += torch.stack(
            [norms.sum(dim=0, dtype=torch.float64), counted.sum(dim=0, dtype=torch.float64)]
        ).cpu()

    def finish(self, processes: Processes = SINGLE) -> Float[Tensor, " units"]:
        """The means, [units] float64, over the tokens of all processes; 0 for a unit without any.

        No more tokens can be added.
        """
        self._blocks.finish()
        self._weight = None
        processes.all_reduce(self._sums)
        norms, tokens = self._sums
        return norms / tokens.clamp_min(1)
