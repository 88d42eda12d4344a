"""Cholesky factors in the memory of their matrix, and solutions by them without copies.

`torch.linalg.cholesky` works in place on column-major matrices only, and `torch.cholesky_solve`
copies the factor: each would need a second matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower factor L of a symmetric positive definite matrix, column-major, in its memory.

    Args:
        matrix: row-major; overwritten.
    """
    columns = matrix.mT  # the same matrix
    return torch.linalg.cholesky(columns, out=columns)


def cholesky_solve(
    factor: Float[Tensor, "n n"], right: Float[Tensor, "n columns"]
) -> Float[Tensor, "n columns"]:
    """(L L^T)^-1 right."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
