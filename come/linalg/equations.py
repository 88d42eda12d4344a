"""The protocol of least-squares problems, and the choice of their form by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.stream.processes import Processes

DUAL = 2  # columns per token from which elimination needs less memory in the dual form
SKETCH = 512  # width of the dual form's random sketch of more than twice as many outputs
LEAST = 1e-30  # lower bound of a mean square


@dataclass(frozen=True)
class Map:
    """A linear map: weight [d_out, d_in], and an optional bias [d_out], in the same dtype."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None


@runtime_checkable
class Elimination(Protocol):
    """Backward elimination of columns from a penalised least-squares problem."""

    def growth(self, size: int) -> Float[Tensor, " units"]:
        """How much the penalised error grows without a unit of `size` adjacent columns, float64.

        growth_u = tr( W_u [ ((G + mu I)^-1)_uu ]^-1 W_u^T )
        """
        ...

    def remove(self, stay: Int[Tensor, " stay"], gone: Int[Tensor, " gone"]) -> None:
        """Removes columns `gone`, and renumbers the others in the order of `stay`."""
        ...

    def solution(self, initial: Map) -> Map:
        """The solution for the columns that remain; `initial`: their part of W_0.

        Called once, at the end.
        """
        ...


@runtime_checkable
class Equations(Protocol):
    """A weighted ridge problem: argmin_W sum_t w_t |y_t - W f_t - b|^2 + mu |W - W_0|^2.

    Attributes:
        width: number of inputs of the map.
    """

    width: int

    def add(
        self,
        features: Float[Tensor, "tokens width"],
        targets: Float[Tensor, "tokens out"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Adds a batch of tokens."""
        ...

    def all_reduce(self, processes: Processes) -> None:
        """Adds the tokens of the other processes; called once, after the last batch."""
        ...

    def mean_diagonal(self) -> float:
        """Mean over the inputs of sum_t w_t f_t^2, the unit of a relative penalty; positive."""
        ...

    def solve(self, initial: Map, penalty: float, *, consume: bool = False) -> Map:
        """The solution; `consume` reuses the problem's memory and makes the problem invalid."""
        ...

    def columns(self, kept: Int[Tensor, " kept"]) -> Equations:
        """The problem for a subset of the inputs."""
        ...

    def leverage(self, penalty: float) -> Float[Tensor, " width"]:
        """diag( G (G + mu I)^-1 ), in [0, 1), float64; without the constant of a bias."""
        ...

    def elimination(self, initial: Map, penalty: float, *, consume: bool = False) -> Elimination:
        """Backward elimination from all columns; `consume` as in `solve`."""
        ...


def eliminate(
    sums: Equations,
    initial: Map,
    penalty: float,
    keep: int,
    size: int,
    rate: float,
    *,
    consume: bool = False,
) -> tuple[list[int], Elimination]:
    """Backward elimination of units of `size` adjacent columns until `keep` units remain.

    Args:
        sums: the equations of all columns.
        initial: the map that the penalty refers to.
        penalty: absolute.
        keep: units to keep.
        size: columns of a unit.
        rate: share of the surplus that is removed per round, but at least 1% of `keep` and at
            least one unit.
        consume: whether the equations are not needed afterwards.

    Returns:
        Kept units, ascending, and the elimination, which has their solution.
    """
    alive = list(range(sums.width // size))
    state = sums.elimination(initial, penalty, consume=consume)
    del initial  # as wide as all columns
    while len(alive) > keep:
        surplus = len(alive) - keep
        leaving = min(surplus, max(1, keep // 100, int(surplus * rate)))
        order = torch.sort(state.growth(size), descending=True, stable=True).indices.tolist()
        stay, gone = sorted(order[: len(alive) - leaving]), sorted(order[len(alive) - leaving :])
        state.remove(unit_columns(stay, size), unit_columns(gone, size))
        alive = [alive[i] for i in stay]
    return alive, state


def choice_dtype(width: int, ratio: float, *, bias: bool = False) -> torch.dtype:
    """The dtype of normal equations that are used only to select inputs.

    float32 if the penalty keeps the condition number, at most width / ratio, below 10^5. It nearly
    always keeps the same inputs as float64 then (experiments/LOG.md), in half the memory and time.

    Args:
        width: number of inputs.
        ratio: penalty relative to the mean diagonal.
        bias: whether there is a constant, which is not penalised.
    """
    return torch.float32 if width / ratio < 1e5 and not bias else torch.float64


def outputs_read(out: int) -> int:
    """Number of outputs, or of random sums of them, that the dual form's elimination reads."""
    return SKETCH if out > 2 * SKETCH else out


def unit_columns(units: list[int], size: int) -> Int[Tensor, " columns"]:
    """Column indices of units that have `size` adjacent columns each."""
    first = torch.as_tensor(units, dtype=torch.long) * size
    return (first[:, None] + torch.arange(size)).flatten()
