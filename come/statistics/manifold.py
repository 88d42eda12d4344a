"""MKA's similarity of layers: diffusion maps of hidden states, and their mutual information."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from come.stream.stream import LayerStream

NEIGHBOUR = 8  # k of the k-th nearest neighbour, whose distance is a point's kernel scale
ALPHA = 0.5  # exponent of the density normalisation
DIMENSIONS = 2
MIN_WINDOWS = 5


def last_states(stream: LayerStream, boundary: int) -> Float[Tensor, "windows hidden"]:
    """Hidden states of the last token of every window at a boundary, float64.

    Raises:
        ValueError: there are fewer than `MIN_WINDOWS` windows.
    """
    if len(stream.windows) < MIN_WINDOWS:
        raise ValueError(
            f"calibration.num_samples={len(stream.windows)}: MKA compares layers by one state a "
            f"window, and needs at least {MIN_WINDOWS} windows"
        )
    states = [after[:, -1].double().cpu() for _, after in stream.pairs(boundary, boundary)]
    return torch.cat(states)


def diffusion_map(points: Float[Tensor, "points hidden"]) -> Float[Tensor, "points 2"]:
    """Two diffusion coordinates of every point, as ranks scaled to [0, 1), float64.

        K_ij = exp(-|x_i - x_j|^2 / (s_i s_j)),  s_i the distance to the 8th nearest neighbour
        K_ij <- K_ij / (q_i q_j)^alpha,  q_i = sum_j K_ij,  alpha = 1/2;  P = K / row sums

    The coordinates are the first two right eigenvectors of P after the constant one, times their
    eigenvalues. Each is replaced by its ranks divided by the number of points.

    Source: arXiv 2406.16330 (MKA), diffusion kernel and constants of the published code.
    """
    count = len(points)
    distance = torch.cdist(points, points)
    scale = distance.sort(dim=1).values[:, min(NEIGHBOUR, count - 1)].clamp_min(1e-12)
    kernel = torch.exp(-distance.square() / (scale[:, None] * scale[None, :]))
    density = kernel.sum(dim=1) ** ALPHA
    kernel = kernel / (density[:, None] * density[None, :])
    degree = kernel.sum(dim=1).sqrt()
    values, vectors = torch.linalg.eigh(kernel / (degree[:, None] * degree[None, :]))
    taken = torch.arange(count - 2, count - 2 - DIMENSIONS, -1)
    walk = vectors[:, taken] / degree[:, None]
    walk = walk * torch.where(walk.sum(dim=0) < 0, -1.0, 1.0) * values[taken]
    return walk.argsort(dim=0).argsort(dim=0).double() / count


def shared_information(one: Float[Tensor, "points 2"], other: Float[Tensor, "points 2"]) -> float:
    """Normalised mutual information of two embeddings of the same points, about [0, 1].

        S = I(one; other) / sqrt( I(one; one) I(other; other) )

    I is a nearest-neighbour estimate, in nats, averaged over pairs of coordinates. 0 if the
    product under the root is not positive. Differs from the paper's code, which divides by an
    estimate of the entropies that may be negative.
    """
    from sklearn.feature_selection import mutual_info_regression  # takes a second to import

    def information(x: Tensor, y: Tensor) -> float:
        found = [
            mutual_info_regression(x.numpy(), column.numpy(), random_state=0).mean()
            for column in y.T
        ]
        return float(np.mean(found))

    own = information(one, one) * information(other, other)
    return information(one, other) / own**0.5 if own > 0 else 0.0
