"""Ridge regression in its dual form, for problems with many more columns than tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from come.linalg.cholesky import cholesky, cholesky_solve
from come.linalg.equations import LEAST, Elimination, Map, outputs_read
from come.stream.processes import Processes

COLUMNS = 4096  # columns per tile
BLOCK = 768  # rows of an inverse factor that are multiplied at a time


class Dual:
    """A ridge problem in its dual form: no tensor grows with the square of the columns.

        W = W_0 + R^T (F F^T + mu I)^-1 F     R = Y - F W_0^T
        diag( (F^T F + mu I)^-1 )_j = (1 - |L^-1 f_j|^2) / mu     L L^T = F F^T + mu I

    F: the inputs of all tokens, [tokens, columns]; Y: their targets; both times the root of the
    token's weight. A bias is not penalised: F and Y are centred for it.

    F is stored transposed, [columns, tokens], in float32. Products with it run in float32; the
    tokens x tokens matrix and its factor are float64. F is read in tiles of 4096 columns, so it may
    be stored outside a GPU, in main memory or in a memory-mapped file.

    Args:
        width: number of inputs of the map.
        out: number of outputs.
        tokens: number of tokens that will be added, by all processes.
        bias: whether the map has a bias.
        device: device of all tensors but `rows`.
        rows: storage of F, zeros of shape [width, tokens]; None to allocate it on the device.
        first: index of the first token that this process adds.
    """

    def __init__(
        self,
        width: int,
        out: int,
        tokens: int,
        *,
        bias: bool,
        device: torch.device | str = "cpu",
        rows: Float[Tensor, "width tokens"] | None = None,
        first: int = 0,
    ) -> None:
        self.width = width
        self.bias = bias
        self._device = torch.device(device)
        self._rows = torch.zeros(width, tokens, device=device) if rows is None else rows
        self._targets = torch.zeros(tokens, out, device=device)
        self._roots = torch.zeros(tokens, device=device)
        self._means: tuple[Tensor, Tensor] | None = None
        self._filled = first

    def add(
        self,
        features: Float[Tensor, "tokens width"],
        targets: Float[Tensor, "tokens out"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Adds a batch of tokens."""
        self.add_columns(0, self._filled, features, weights)
        self.add_targets(targets, weights)

    def add_columns(
        self,
        column: int,
        token: int,
        features: Float[Tensor, "tokens columns"],
        weights: Float[Tensor, " tokens"],
    ) -> None:
        """Adds a block of F: inputs from index `column` on, of tokens from index `token` on."""
        rows = (features.float() * weights.float().sqrt()[:, None]).T
        self._rows[column : column + len(rows), token : token + rows.shape[1]] = rows

    def add_targets(
        self, targets: Float[Tensor, "tokens out"], weights: Float[Tensor, " tokens"]
    ) -> None:
        """Adds the targets of a batch of tokens, after those of earlier batches."""
        chosen = slice(self._filled, self._filled + len(targets))
        self._filled = chosen.stop
        self._roots[chosen] = weights.float().sqrt()
        self._targets[chosen] = targets.to(self._targets) * self._roots[chosen, None]

    def all_reduce(self, processes: Processes) -> None:
        """Adds the tokens of the other processes."""
        processes.all_reduce(self._rows, self._targets, self._roots)
        self._filled = self._rows.shape[1]

    def mean_diagonal(self) -> float:
        """Mean over the inputs of sum_t w_t f_t^2; positive."""
        assert self._means is None, "the inputs are centred already"
        total = sum(
            rows.square().sum(dtype=torch.float64).item() for rows in self._rows.split(COLUMNS)
        )
        return max(total / self.width, LEAST)

    def solve(self, initial: Map, penalty: float, *, consume: bool = False) -> Map:
        """The ridge solution, float32."""
        self._centre()
        weight = _transposed(initial.weight, self._targets)
        residual = self._residual(self._targets, weight)
        solved = _solved(_penalised(_gram(self._rows, self._device), penalty), residual).float()
        for part, rows in _tiles(self._rows, self._device):
            weight[part] += rows @ solved
        found = weight.T
        if self._means is None:
            return Map(found)
        features, targets = self._means
        return Map(found, targets - found @ features)

    def columns(self, kept: Int[Tensor, " kept"]) -> Dual:
        """The problem for a subset of the inputs."""
        return self.with_rows(self._rows[kept.to(self._rows.device)], kept)

    def with_rows(self, rows: Float[Tensor, "kept tokens"], kept: Int[Tensor, " kept"]) -> Dual:
        """The problem for a subset of the inputs, whose rows are given."""
        out, device = self._targets.shape[1], self._device
        chosen = Dual(len(kept), out, 0, bias=self.bias, device=device, rows=rows)
        chosen._filled = self._filled
        chosen._targets, chosen._roots = self._targets, self._roots
        if self._means is not None:
            features, targets = self._means
            chosen._means = features[kept.to(features.device)], targets
        return chosen

    def leverage(self, penalty: float) -> Float[Tensor, " width"]:
        """diag( G (G + mu I)^-1 ), in [0, 1), float64; without the constant of a bias."""
        assert self._means is None, "the inputs are centred already"
        return _leverage(self._rows, _penalised(_gram(self._rows, self._device), penalty))

    def elimination(self, initial: Map, penalty: float, *, consume: bool = False) -> Elimination:
        """Backward elimination; with `consume` it works on the rows of this problem."""
        self._centre()
        rows = self._rows if consume else self._rows.clone()
        return DualElimination(self, rows, initial, penalty)

    def sketch(self, initial: Map) -> tuple[Tensor, Tensor]:
        """W_0^T and Y - F W_0^T, times a random matrix Q if there are many outputs.

        Q has r columns of entries +-r^-1/2, so |w Q|^2 is |w|^2 on average, with a relative
        standard deviation of at most (2 / r)^1/2: 6% for r = 512 (Johnson and Lindenstrauss 1984).
        """
        out, targets = self._targets.shape[1], self._targets
        read = outputs_read(out)
        if read == out:
            weight = _transposed(initial.weight, targets)
            return weight, self._residual(targets, weight)
        signs = torch.randint(0, 2, (out, read), generator=torch.Generator().manual_seed(0))
        random = ((2.0 * signs - 1) / read**0.5).to(targets)
        weight = torch.cat([w.to(targets) @ random for w in initial.weight.T.split(COLUMNS)])
        return weight, self._residual(targets @ random, weight)

    def _residual(self, targets: Tensor, weight: Tensor) -> Tensor:
        """Y - F W, with W [columns, out]."""
        found = targets.clone()
        for part, rows in _tiles(self._rows, self._device):
            found -= rows.T @ weight[part]
        return found

    def _centre(self) -> None:
        """Projects the constant of a bias out of inputs and targets."""
        assert self._filled == self._rows.shape[1]
        if not self.bias or self._means is not None:
            return
        total = self._roots.square().sum()
        of_rows = [rows @ self._roots for _, rows in _tiles(self._rows, self._device)]
        means = torch.cat(of_rows) / total, (self._roots @ self._targets) / total
        for part, rows in _tiles(self._rows, self._device):
            self._rows[part] = (rows - means[0][part, None] * self._roots).to(self._rows.device)
        self._targets = self._targets - self._roots[:, None] * means[1]
        self._means = means


class DualElimination:
    """Backward elimination in the dual form: S <- S - F_U F_U^T when columns U leave.

        S = F F^T + mu I    W = W_0 + F^T Z    Z = S^-1 (Y - F W_0)

    Here W is [columns, out], the transpose of a `Map`'s weight. If few columns leave, the solution
    and the diagonal of the inverse are updated; if many leave, they are recomputed, which is then
    cheaper. Only W is stored, since W_0 = W - F^T Z. If the map has many outputs, the elimination
    reads a random sketch of them (see `Dual.sketch`); only `solution` reads the outputs themselves.

    Args:
        problem: the problem of all columns.
        rows: F, [columns, tokens]; changed.
        initial: the map that the penalty refers to.
        penalty: mu.
    """

    def __init__(self, problem: Dual, rows: Tensor, initial: Map, penalty: float) -> None:
        self._problem = problem
        self._kept = torch.arange(len(rows), device=rows.device)
        self._rows, self._penalty = rows, penalty
        self._weight, self._residual = problem.sketch(initial)
        self._device = self._weight.device
        self._gram = _gram(rows, self._device)
        self._solution = torch.zeros_like(self._residual)
        self._anew()

    def solution(self, initial: Map) -> Map:
        """See `come.linalg.equations.Elimination`."""
        problem = self._problem.with_rows(self._rows, self._kept)
        return problem.solve(initial, self._penalty)

    def _anew(self) -> None:
        """Recomputes factor, leverage, Z and W from the current S and residual."""
        self._factor = _penalised(self._gram, self._penalty)
        self._leverage = _leverage(self._rows, self._factor)
        before, self._solution = self._solution, _solved(self._factor, self._residual).float()
        change = self._solution - before
        for part, rows in _tiles(self._rows, self._device):
            self._weight[part] += rows @ change

    def growth(self, size: int) -> Float[Tensor, " units"]:
        """See `come.linalg.equations.Elimination`."""
        free = (1 - self._leverage).clamp_min(1e-12) / self._penalty
        if size == 1:
            parts = self._weight.split(COLUMNS)
            sizes = [part.square().sum(dim=1, dtype=torch.float64) for part in parts]
            return torch.cat(sizes) / free
        single, found = self._factor.float(), list[Tensor]()
        for rows, weight in zip(self._rows.split(size), self._weight.split(size), strict=True):
            half = torch.linalg.solve_triangular(single, rows.to(single).T, upper=False)
            inverse = self._inverse(half.T, half, same=True)
            wide = weight.double()
            solved = torch.cholesky_solve(wide, torch.linalg.cholesky(inverse))
            found.append((wide * solved).sum())
        return torch.stack(found)

    def remove(self, stay: Int[Tensor, " stay"], gone: Int[Tensor, " gone"]) -> None:
        """See `come.linalg.equations.Elimination`."""
        stay, gone = stay.to(self._rows.device), gone.to(self._rows.device)
        self._kept = self._kept[stay]
        leaving, many = self._rows[gone].to(self._device), 4 * len(gone) >= self._rows.shape[1]
        initial = self._weight[gone] - leaving @ self._solution
        if many:
            self._weight = _compacted(self._weight, stay)
        else:
            self._update(stay, gone, leaving)
        self._residual = self._residual + leaving.T @ initial
        self._gram -= (leaving.T @ leaving).double()
        self._rows = _compacted(self._rows, stay)
        if many:
            self._anew()
        else:
            self._factor = _penalised(self._gram, self._penalty)

    def _update(self, stay: Tensor, gone: Tensor, leaving: Tensor) -> None:
        """Updates the solution and the diagonal of B_ss when columns U leave.

        W_s <- W_s - B_su V    Z <- Z + S^-1 F_U V / mu    V = B_uu^-1 W_u    B = (G + mu I)^-1
        """
        read = _solved(self._factor, leaving.T).float()
        inner = torch.linalg.cholesky(self._inverse(leaving, read, same=True))
        solved = torch.cholesky_solve(self._weight[gone].double(), inner).float()
        self._solution += read @ solved / self._penalty
        weight, leverage = _compacted(self._weight, stay), self._leverage[stay]
        for start in range(0, len(stay), COLUMNS):
            part = slice(start, start + COLUMNS)
            cross = self._inverse(self._rows[stay[part]].to(self._device), read)
            weight[part] -= cross.float() @ solved
            taken = torch.linalg.solve_triangular(inner, cross.T, upper=False).square().sum(dim=0)
            leverage[part] += self._penalty * taken  # the inverse's diagonal shrinks
        self._weight, self._leverage = weight, leverage

    def _inverse(self, first: Tensor, read: Tensor, same: bool = False) -> Tensor:
        """The block of B = (I - F^T S^-1 F) / mu for two sets of columns, float64.

        Args:
            first: the columns F_1 of one set, [columns, tokens], or L^-1 F_1 transposed.
            read: S^-1 F_2 of the other set, [tokens, columns], float32, or L^-1 F_2.
            same: whether both sets are the same.
        """
        block = -(first @ read).double()
        if same:
            block = (block + block.T) / 2
            block.diagonal().add_(1)
        return block / self._penalty


def _tiles(rows: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of the columns of F: each slice, and its columns on the device."""
    for start in range(0, len(rows), COLUMNS):
        part = slice(start, min(start + COLUMNS, len(rows)))
        yield part, rows[part].to(device)


def _transposed(weight: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy of the transposed matrix, in the dtype and on the device of `like`."""
    return like.new_empty(weight.T.shape).copy_(weight.T)


def _gram(rows: Tensor, device: torch.device) -> Tensor:
    """F F^T over the tokens, float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=device)
    for _, part in _tiles(rows, device):
        total += part.T @ part
    return total


def _penalised(gram: Tensor, penalty: float) -> Tensor:
    """The Cholesky factor of gram + penalty I."""
    damped = gram.clone()
    damped.diagonal().add_(penalty)
    return cholesky(damped)


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    return cholesky_solve(factor, right.double())


def _leverage(rows: Tensor, factor: Tensor) -> Tensor:
    """|L^-1 f_j|^2 of every column, float64; L^-1 and its products are float32.

    Products with blocks of L^-1 are faster on a CPU than solving with L.
    """
    inverse = torch.eye(len(factor), device=factor.device)
    torch.linalg.solve_triangular(factor.float(), inverse, upper=False, out=inverse)
    found = torch.zeros(len(rows), dtype=torch.float64, device=factor.device)
    for part, tile in _tiles(rows, factor.device):
        for start in range(0, len(inverse), BLOCK):
            block = inverse[start : start + BLOCK, : start + BLOCK]
            products = tile[:, : block.shape[1]] @ block.T
            found[part] += products.square_().sum(dim=1, dtype=torch.float64)
    return found


def _compacted(rows: Tensor, stay: Tensor) -> Tensor:
    """The rows `stay`, ascending, moved to the front of the same memory."""
    for start in range(0, len(stay), COLUMNS):
        part = stay[start : start + COLUMNS]
        rows[start : start + len(part)] = rows[part]
    return rows[: len(stay)]
