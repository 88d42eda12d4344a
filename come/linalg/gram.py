"""Ridge regression from streamed batches: the normal equations of an output map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.stream.token_blocks import TokenBlocks

BLOCK = 512  # columns of a Gram matrix that are added at a time
_LEAST = 1e-30  # of a mean square


@dataclass(frozen=True)
class Map:
    """An output map: weight [d_out, d_in] float64, and a bias [d_out] float64 where it has one."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None


class Gram:
    """Weighted second moments of a map's inputs and of its targets, summed over tokens.

        G = sum_t w_t f_t f_t^T    C = sum_t w_t f_t y_t^T    Y = sum_t w_t |y_t|^2

    f has a constant 1 at its end where the map has a bias. Products of a batch run in float32 or
    wider, sums in float64, so memory does not grow with the number of tokens.

    Args:
        width: inputs d_in of the map.
        out: outputs d_out.
        bias: whether the map has a bias.
        device: where the sums are kept.
    """

    def __init__(
        self, width: int, out: int, *, bias: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.width = width
        self.bias = bias
        size = width + int(bias)
        self._upper = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._mirrored = True
        self._moment = torch.zeros(size, out, dtype=torch.float64, device=device)
        self._energy = 0.0
        self._blocks = TokenBlocks(self._accumulate)

    @property
    def gram(self) -> Float[Tensor, "columns columns"]:
        """G; what is above its diagonal is added, and copied below it when it is asked for."""
        self._blocks.finish()
        if not self._mirrored:
            for start in range(0, len(self._upper), BLOCK):
                end = start + BLOCK
                self._upper[end:, start:end] = self._upper[start:end, end:].T
            self._mirrored = True
        return self._upper

    @property
    def moment(self) -> Float[Tensor, "columns out"]:
        """C."""
        self._blocks.finish()
        return self._moment

    @property
    def energy(self) -> float:
        """Y."""
        self._blocks.finish()
        return self._energy

    def add(
        self,
        features: Float[Tensor, "tokens width"],
        targets: Float[Tensor, "tokens out"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Adds a batch of tokens."""
        wide = torch.promote_types(features.dtype, torch.float32)
        features, targets = features.to(wide), targets.to(wide)
        if self.bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        root = weights.to(wide).sqrt()[:, None]
        self._blocks.add(features * root, targets * root)

    def _accumulate(self, features: Tensor, targets: Tensor) -> None:
        """Adds a block of weighted rows."""
        for start in range(0, len(self._upper), BLOCK):
            own = features[:, start : start + BLOCK]
            self._upper[start : start + BLOCK, start:] += own.T @ features[:, start:]
        self._mirrored = False
        self._moment += features.T @ targets
        self._energy += targets.double().square().sum().item()

    def __add__(self, other: Gram) -> Gram:
        """The equations of both sets of tokens."""
        total = Gram(self.width, self.moment.shape[1], bias=self.bias, device=self.moment.device)
        total._upper = self.gram + other.gram
        total._moment = self.moment + other.moment
        total._energy = self.energy + other.energy
        return total

    def mean_diagonal(self) -> float:
        """Mean diagonal of the inputs' Gram matrix, to which a relative lambda refers.

        Above 0 also where all inputs are 0, so that a penalty on them leaves the prior.
        """
        return max(self.gram.diagonal()[: self.width].mean().item(), _LEAST)

    def columns(self, kept: Int[Tensor, " kept"]) -> Gram:
        """The equations of some of the inputs; the constant stays."""
        rows = kept
        if self.bias:
            rows = torch.cat([kept, kept.new_tensor([self.width])])
        chosen = Gram(len(kept), self.moment.shape[1], bias=self.bias, device=self.moment.device)
        chosen._upper = self.gram[rows][:, rows]
        chosen._moment = self.moment[rows]
        chosen._energy = self.energy
        return chosen

    def solve(self, prior: Map, penalty: float) -> Map:
        """argmin_W sum_t w_t |y_t - W f_t - b|^2 + penalty |W - W0|^2, by Cholesky.

        The bias is solved for with the weight and not penalised (but for rounding's sake).

        Args:
            prior: W0 and its bias.
            penalty: absolute, > 0.
        """
        solved = torch.cholesky_solve(self.pull(prior, penalty), self.factor(penalty)).T
        return Map(solved[:, : self.width], solved[:, self.width] if self.bias else None)

    def ridge(self, penalty: float) -> Float[Tensor, " columns"]:
        """The penalty on each column: the constant's is next to nothing."""
        ridge = torch.full((len(self.gram),), penalty, dtype=torch.float64).to(self.gram)
        ridge[self.width :] = 1e-9 * max(penalty, self.gram.diagonal().max().item())
        return ridge

    def factor(self, penalty: float) -> Float[Tensor, "columns columns"]:
        """Cholesky factor of G + ridge; of a wide map one matrix takes hundreds of MB."""
        damped = self.gram.clone()
        damped.diagonal().add_(self.ridge(penalty))
        return torch.linalg.cholesky(damped, out=damped)

    def pull(self, prior: Map, penalty: float) -> Float[Tensor, "columns out"]:
        """The right-hand side: C + ridge W0^T."""
        return self.moment + self.ridge(penalty)[:, None] * stacked(prior).to(self.moment)

    def error(self, found: Map) -> float:
        """sum_t w_t |y_t - W f_t - b|^2."""
        rows = stacked(found).to(self.gram)
        fit = (rows * (self.gram @ rows)).sum() - 2 * (rows * self.moment).sum()
        return self.energy + fit.item()


def check_lambda(key: str, ratio: object) -> float | Literal["auto"]:
    """Raises ValueError, naming the configuration key, unless a number above 0 or "auto"."""
    if ratio == "auto":
        return "auto"
    if isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio < math.inf:
        return float(ratio)
    raise ValueError(f"{key}={ratio}: must be a number above 0, or auto")


def best_lambda(fit: Gram, held_out: Gram, prior: Map, grid: Sequence[float]) -> float:
    """The relative lambda whose solution on `fit` has the least error on `held_out`."""
    scale = fit.mean_diagonal()
    return min(grid, key=lambda ratio: held_out.error(fit.solve(prior, ratio * scale)))


def stacked(found: Map) -> Float[Tensor, "in out"]:
    """The map's weight, transposed, and its bias as the last row."""
    weight = found.weight.double().T
    return weight if found.bias is None else torch.cat([weight, found.bias.double()[None]])
