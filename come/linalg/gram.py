"""Ridge regression from streamed batches: the normal equations of a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from scipy.linalg.lapack import dpotri, spotri
from torch import Tensor

from come.linalg.cholesky import cholesky, cholesky_solve
from come.linalg.equations import LEAST, Elimination, Map
from come.stream.processes import Processes
from come.stream.token_blocks import TokenBlocks
from come.weak import weak_method

BLOCK = 512  # columns of a Gram matrix that are updated at a time


class Gram:
    """Weighted second moments of a map's inputs and targets, summed over tokens.

        G = sum_t w_t f_t f_t^T    C = sum_t w_t f_t y_t^T    Y = sum_t w_t |y_t|^2

    If the map has a bias, f ends with a constant 1. Products within a block of tokens run in
    float32 or wider, sums over blocks in `dtype`. Memory does not grow with the number of tokens.

    Args:
        width: number of inputs d_in of the map.
        out: number of outputs d_out.
        bias: whether the map has a bias.
        device: device of the sums.
        dtype: dtype of the sums and of everything solved from them (see `choice_dtype`).
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        bias: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.width = width
        self.bias = bias
        size = width + int(bias)
        self._upper = torch.zeros(size, size, dtype=dtype, device=device)
        self._mirrored = True
        self._moment = torch.zeros(size, out, dtype=dtype, device=device)
        self._yty = 0.0
        self._blocks = TokenBlocks(weak_method(self._accumulate))

    @property
    def gram(self) -> Float[Tensor, "columns columns"]:
        """G; only its upper triangle is accumulated, and reading this property mirrors it."""
        self._blocks.finish()
        if not self._mirrored:
            _mirror(self._upper)
            self._mirrored = True
        return self._upper

    @property
    def moment(self) -> Float[Tensor, "columns out"]:
        """C."""
        self._blocks.finish()
        return self._moment

    @property
    def yty(self) -> float:
        """Y."""
        self._blocks.finish()
        return self._yty

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
            own, upper = features[:, start : start + BLOCK].T, self._upper[start : start + BLOCK]
            _add_product(upper[:, start:], own, features[:, start:])
        self._mirrored = False
        _add_product(self._moment, features.T, targets)
        self._yty += targets.double().square().sum().item()

    def all_reduce(self, processes: Processes) -> None:
        """Adds the tokens of the other processes."""
        self._blocks.finish()
        processes.all_reduce(self._upper, self._moment)
        self._yty = processes.reduced(self._yty)
        self._mirrored = False

    def __add__(self, other: Gram) -> Gram:
        """The sums over both sets of tokens."""
        total = self._empty(self.width)
        total._upper = self.gram + other.gram
        total._moment = self.moment + other.moment
        total._yty = self.yty + other.yty
        return total

    def _empty(self, width: int) -> Gram:
        """Equations for another set of inputs, without any tokens."""
        out, device, dtype = self.moment.shape[1], self.moment.device, self.moment.dtype
        return Gram(width, out, bias=self.bias, device=device, dtype=dtype)

    def mean_diagonal(self) -> float:
        """Mean diagonal of the inputs' Gram matrix, the unit of a relative lambda.

        Positive even if all inputs are 0, so that the penalty then gives the initial map.
        """
        return max(self.gram.diagonal()[: self.width].mean().item(), LEAST)

    def columns(self, kept: Int[Tensor, " kept"]) -> Gram:
        """The equations for a subset of the inputs; the constant is kept."""
        rows = kept.to(self._upper.device)
        if self.bias:
            rows = torch.cat([rows, rows.new_tensor([self.width])])
        chosen = self._empty(len(kept))
        chosen._upper = self.gram[rows][:, rows]
        chosen._moment = self.moment[rows]
        chosen._yty = self.yty
        return chosen

    def solve(self, initial: Map, penalty: float, *, consume: bool = False) -> Map:
        """argmin_W sum_t w_t |y_t - W f_t - b|^2 + penalty |W - W0|^2, by Cholesky.

        The bias is solved together with the weight. Its penalty is negligible and only ensures
        numerical stability.

        Args:
            initial: W0 and its bias.
            penalty: absolute, > 0.
            consume: whether the factor may overwrite G, and the right-hand side C, to save memory.
        """
        rhs = self.rhs(initial, penalty, consume=consume)
        solved = cholesky_solve(self.factor(penalty, consume=consume), rhs).T
        return Map(solved[:, : self.width], solved[:, self.width] if self.bias else None)

    def minimum_norm(self) -> Map:
        """The least-squares map without a penalty; of several, the one with the smallest norm."""
        assert not self.bias
        found = torch.linalg.lstsq(self.gram.cpu(), self.moment.cpu(), driver="gelsd").solution
        return Map(found.T.to(self.gram.device))

    def ridge(self, penalty: float) -> Float[Tensor, " columns"]:
        """The penalty on each column; the constant's is negligible."""
        ridge = self.gram.new_full((len(self.gram),), penalty)
        ridge[self.width :] = 1e-9 * max(penalty, self.gram.diagonal().max().item())
        return ridge

    def factor(self, penalty: float, *, consume: bool = False) -> Float[Tensor, "columns columns"]:
        """Cholesky factor of G + ridge, in place on G or on a copy of it."""
        ridge = self.ridge(penalty)
        damped = self.gram if consume else self.gram.clone()
        damped.diagonal().add_(ridge)
        return cholesky(damped)

    def rhs(
        self, initial: Map, penalty: float, *, consume: bool = False
    ) -> Float[Tensor, "columns out"]:
        """The right-hand side: C + ridge W0^T, in place on C or on a copy of it."""
        right = self.moment if consume else self.moment.clone()
        return right.add_(self.ridge(penalty)[:, None] * stacked(initial).to(right))

    def leverage(self, penalty: float) -> Float[Tensor, " width"]:
        """diag( G (G + mu I)^-1 ) of the inputs, in [0, 1), float64; without the constant."""
        damped = self.gram[: self.width, : self.width].clone()
        damped.diagonal().add_(penalty)
        inverse = inverse_of(cholesky(damped)).diagonal().double()
        return (1 - penalty * inverse).clamp_min(0)

    def elimination(self, initial: Map, penalty: float, *, consume: bool = False) -> Elimination:
        """Backward elimination on the inverse; with `consume` the inverse replaces G."""
        rhs = self.rhs(initial, penalty, consume=consume)
        return DenseElimination(self.factor(penalty, consume=consume), rhs, self.width)

    def error(self, found: Map) -> float:
        """sum_t w_t |y_t - W f_t - b|^2."""
        rows = stacked(found).to(self.gram)
        fit = (rows * (self.gram @ rows)).sum() - 2 * (rows * self.moment).sum()
        return self.yty + fit.item()


class DenseElimination:
    """Backward elimination on the inverse B = (G + ridge)^-1.

        B <- B_ss - B_sg B_gg^-1 B_gs    W <- W_s - B_sg B_gg^-1 W_g

    s: the remaining columns; g: the removed ones. A round costs n^2 g for n columns instead of n^3.

    Args:
        factor: Cholesky factor of G + ridge; changed.
        rhs: the right-hand side, [columns, out].
        width: number of columns, without the constant of a bias, which is the last one.
    """

    def __init__(self, factor: Tensor, rhs: Tensor, width: int) -> None:
        self._width = width
        self._inverse = inverse_of(factor)
        self._weight = self._inverse @ rhs

    def growth(self, size: int) -> Float[Tensor, " units"]:
        """See `come.linalg.equations.Elimination`."""
        count = self._width // size
        if size == 1:
            free = self._inverse.diagonal()[:count].clamp_min(LEAST)
            return (self._weight[:count].square().sum(dim=1) / free).double()
        rows = self._weight[: count * size].view(count, size, -1)
        spans = [slice(i * size, (i + 1) * size) for i in range(count)]
        blocks = torch.stack([self._inverse[span, span] for span in spans])
        solved = torch.cholesky_solve(rows, torch.linalg.cholesky(blocks))
        return (rows * solved).sum(dim=(1, 2)).double()

    def solution(self, initial: Map) -> Map:
        """See `come.linalg.equations.Elimination`."""
        solved = self._weight.T
        constant = solved[:, self._width] if len(self._weight) > self._width else None
        return Map(solved[:, : self._width], constant)

    def remove(self, stay: Int[Tensor, " stay"], gone: Int[Tensor, " gone"]) -> None:
        """See `come.linalg.equations.Elimination`."""
        inverse, weight, device = self._inverse, self._weight, self._inverse.device
        constant = torch.arange(self._width, len(inverse))
        self._width = len(stay)
        stay, gone = torch.cat([stay, constant]).to(device), gone.to(device)
        leaving = inverse[:, gone]
        cross = leaving[stay]
        factor = torch.linalg.cholesky(leaving[gone])
        rows = torch.cholesky_solve(torch.cat([cross.T, weight[gone]], dim=1), factor)
        del leaving
        self._weight = weight[stay] - cross @ rows[:, len(stay) :]
        self._inverse = _compacted(inverse, stay).addmm_(cross, rows[:, : len(stay)], alpha=-1)


def inverse_of(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """(L L^T)^-1, in the memory of the column-major lower Cholesky factor L.

    On the CPU it uses LAPACK's `potri`, because `torch.cholesky_inverse` needs a copy and is far
    slower (experiments/LOG.md).
    """
    if factor.device.type != "cpu":
        return torch.cholesky_inverse(factor, out=factor)
    potri = dpotri if factor.dtype == torch.float64 else spotri
    columns, info = potri(factor.numpy(), lower=1, overwrite_c=1)
    assert info == 0
    inverse = torch.from_numpy(columns).T  # row-major again, and its upper triangle
    _mirror(inverse)
    for start in range(0, len(inverse), BLOCK):
        own = inverse[start : start + BLOCK, start : start + BLOCK]
        own.copy_(own.triu() + own.triu(1).T)
    return inverse


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product to `total`, which may have another dtype and device."""
    if (total.dtype, total.device) == (left.dtype, left.device):
        total.addmm_(left, right)
    else:
        total += (left @ right).to(total.device)


def _mirror(upper: Tensor) -> None:
    """Copies the blocks above the diagonal of a square matrix to those below it, in place."""
    for start in range(0, len(upper), BLOCK):
        end = start + BLOCK
        upper[end:, start:end] = upper[start:end, end:].T


def _compacted(matrix: Tensor, stay: Tensor) -> Tensor:
    """The rows and columns `stay`, ascending, moved to the front of the same memory; a view."""
    count = len(stay)
    for start in range(0, count, BLOCK):
        part = stay[start : start + BLOCK]
        matrix[start : start + len(part), :count] = matrix[part].index_select(1, stay)
    return matrix[:count, :count]


def best_lambda(fit: Gram, held_out: Gram, initial: Map, grid: Sequence[float]) -> float:
    """The relative lambda whose solution on `fit` has the lowest error on `held_out`."""
    scale = fit.mean_diagonal()
    return min(grid, key=lambda ratio: held_out.error(fit.solve(initial, ratio * scale)))


def stacked(found: Map) -> Float[Tensor, "in out"]:
    """The map's transposed weight, with the bias as the last row."""
    weight = found.weight.double().T
    return weight if found.bias is None else torch.cat([weight, found.bias.double()[None]])
