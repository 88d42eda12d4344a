"""The subset of a given size with the least quadratic cost."""

from __future__ import annotations

from itertools import chain, combinations
from math import comb

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 1 << 30  # most subsets that are enumerated
_ROWS = 1 << 24  # subsets whose costs are in memory at once


def best_subset(
    linear: Float[Tensor, " items"], pairs: Float[Tensor, "items items"], size: int
) -> list[int]:
    """The set S of `size` items with the least cost.

        E(S) = sum_{i in S} a_i + sum_{i < j in S} b_ij

    Exact by enumeration for up to 2^30 sets; with more, the best local minimum under swaps of one
    item, from one greedy start for each item. Deterministic.

    Args:
        linear: a, float64.
        pairs: b, symmetric with a diagonal of zeros, float64.
        size: items of the set, at least 1 and at most all.

    Returns:
        The items of the set, ascending.
    """
    exact = comb(len(linear), size) <= LARGEST
    return sorted((enumerated if exact else swapped)(linear, pairs, size))


def cost(linear: Tensor, pairs: Tensor, chosen: list[int]) -> float:
    """E(S)."""
    return (linear[chosen].sum() + pairs[chosen][:, chosen].sum() / 2).item()


def enumerated(linear: Tensor, pairs: Tensor, size: int) -> list[int]:
    """The best set, from the costs of all sets.

    The items are halved. For k items of the first half and size - k of the second, with indicator
    vectors x and y,  E = E(x) + E(y) + x^T b y, which is one matrix product.
    """
    half = len(linear) // 2
    best, found = float("inf"), list[int]()
    for k in range(max(0, size - (len(linear) - half)), min(half, size) + 1):
        left, right = _indicators(half, k), _indicators(len(linear) - half, size - k)
        first = _costs(left, linear[:half], pairs[:half, :half])
        second = _costs(right, linear[half:], pairs[half:, half:])
        across = left @ pairs[:half, half:]
        step = max(1, _ROWS // len(right))
        for start in range(0, len(left), step):
            part = across[start : start + step] @ right.T
            part += first[start : start + step, None]
            part += second
            lowest, at = part.flatten().min(dim=0)
            if lowest.item() < best:
                best = lowest.item()
                row, column = divmod(int(at), len(right))
                joined = torch.cat([left[start + row], right[column]])
                found = joined.nonzero().flatten().tolist()
    return found


def _indicators(items: int, size: int) -> Float[Tensor, "sets items"]:
    """A row of zeros and ones for every set of `size` of the items."""
    count = comb(items, size)
    flat = chain.from_iterable(combinations(range(items), size))
    chosen = torch.from_numpy(np.fromiter(flat, np.int64, count * size)).view(count, size)
    return torch.zeros(count, items, dtype=torch.float64).scatter_(1, chosen, 1.0)


def _costs(sets: Tensor, linear: Tensor, pairs: Tensor) -> Tensor:
    return sets @ linear + ((sets @ pairs) * sets).sum(dim=1) / 2


def swapped(linear: Tensor, pairs: Tensor, size: int) -> list[int]:
    """The best of the local minima that greedy sets, one with each item, lead to by swaps."""
    minima = [_descend(linear, pairs, _greedy(linear, pairs, i, size)) for i in range(len(linear))]
    return min(minima, key=lambda chosen: cost(linear, pairs, chosen))


def _greedy(linear: Tensor, pairs: Tensor, first: int, size: int) -> list[int]:
    chosen = [first]
    while len(chosen) < size:
        growth = linear + pairs[chosen].sum(dim=0)
        growth[chosen] = torch.inf
        chosen.append(int(growth.argmin()))
    return chosen


def _descend(linear: Tensor, pairs: Tensor, chosen: list[int]) -> list[int]:
    """Makes the best swap of a chosen item for another one, as long as the cost falls."""
    while True:
        growth = linear + pairs[chosen].sum(dim=0)  # by adding an item, or keeping a chosen one
        change = growth[None, :] - growth[chosen, None] - pairs[chosen]
        change[:, chosen] = torch.inf
        row, item = divmod(int(change.argmin()), len(linear))
        if change[row, item].item() >= -1e-12:
            return chosen
        chosen = [*chosen[:row], item, *chosen[row + 1 :]]
