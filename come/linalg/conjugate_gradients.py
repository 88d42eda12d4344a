"""Conjugate gradients for problems that are too large for a matrix of the normal equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from come.stream.token_blocks import BLOCK


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """Approximates x with product(x) = target by conjugate gradients from x = 0.

    Args:
        product: multiplies a symmetric positive definite matrix with a tensor shaped as `target`.
        target: the right-hand side; overwritten.
        steps: largest number of iterations; it stops early when the residual vanishes.
    """
    found = torch.zeros_like(target)
    rest = target
    direction = rest.clone()
    size = start = _dot(rest, rest)
    for _ in range(steps):
        if size <= 1e-30 * start:
            break
        curved = product(direction)
        length = size / _dot(direction, curved)
        found.add_(direction, alpha=length)
        rest.sub_(curved, alpha=length)
        last, size = size, _dot(rest, rest)
        direction.mul_(size / last).add_(rest)
    return found


def right_divided(
    right: Float[Tensor, "rows n"], root: Float[Tensor, "n n"], *, upper: bool
) -> Float[Tensor, "rows n"]:
    """Divides by a triangular matrix: right root^-1, by blocks of rows."""
    found = torch.empty_like(right)
    for start in range(0, len(right), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = torch.linalg.solve_triangular(root, right[part], upper=upper, left=False)
    return found


def _dot(first: Tensor, second: Tensor) -> float:
    """The inner product, summed in float64 over blocks of rows."""
    pairs = zip(first.split(BLOCK), second.split(BLOCK), strict=True)
    return sum((a * b).sum(dtype=torch.float64).item() for a, b in pairs)
