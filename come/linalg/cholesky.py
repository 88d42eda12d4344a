"""In-place Cholesky factorisation, and solving without copies of the factor.

`torch.linalg.cholesky` works in place on column-major matrices only, and `torch.cholesky_solve`
copies the factor, so both would need memory for a second matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower factor L of a symmetric positive definite matrix, column-major, in place.

    Args:
        matrix: row-major; overwritten.
    """
    columns = matrix.mT  # equal, since the matrix is symmetric
    return torch.linalg.cholesky(columns, out=columns)


def cholesky_solve(
    factor: Float[Tensor, "n n"], right: Float[Tensor, "n columns"]
) -> Float[Tensor, "n columns"]:
    """(L L^T)^-1 right."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
