"""Subsets of least cost: of a given size with a quadratic cost, or of items with sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import chain, combinations
from math import comb, inf

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


def best_consistent_subset(
    linear: Float[Tensor, " items"], pairs: Float[Tensor, "items items"], size: int
) -> list[int]:
    """The set S of `size` items with the least cost, which counts no less than its worst pair.

        max(E(S), max_{i < j in S} E({i, j}))

    A quadratic cost that is exact for pairs may fall below them in larger sets, and even below 0,
    where costs saturate. The cheapest set is the answer if no pair in it costs more. Otherwise let
    t be the least cost of a pair for which the cheapest set without pairs above t costs at most t:
    the answer is that set, or the cheapest one without pairs of t and above. Arguments, result and
    exactness are those of `best_subset`.
    """
    unbounded = best_subset(linear, pairs, size)
    if consistent_cost(linear, pairs, unbounded) <= cost(linear, pairs, unbounded):
        return unbounded
    every = linear[:, None] + linear + pairs
    bounds = every[torch.ones_like(pairs).triu(1) > 0].unique().tolist()
    barred = 4 * float(linear.abs().sum() + pairs.abs().sum()) + 1  # more than any set costs

    @cache
    def best(index: int) -> tuple[float, list[int]]:
        """The least E(S) of sets without pairs above a bound, infinite without such a set."""
        allowed = (every <= bounds[index]).fill_diagonal_(True)
        costs = torch.where(allowed, pairs, barred)
        found = best_subset(linear, costs, size)
        least = cost(linear, costs, found)
        return (least if least < barred / 2 else inf), found

    reached = bisect_left(range(len(bounds)), True, key=lambda i: best(i)[0] <= bounds[i])
    around = [best(i)[1] for i in (reached - 1, reached) if 0 <= i < len(bounds)]
    return min(around, key=lambda chosen: consistent_cost(linear, pairs, chosen))


def consistent_cost(linear: Tensor, pairs: Tensor, chosen: list[int]) -> float:
    """max(E(S), max_{i < j in S} E({i, j}))."""
    worst = [cost(linear, pairs, [*pair]) for pair in combinations(chosen, 2)]
    return max([cost(linear, pairs, chosen), *worst])


def cheapest_cover(sizes: Sequence[int], costs: Sequence[float], least: int) -> list[int]:
    """The items S with the least sum of costs whose sizes sum to at least `least`.

    Exact: item by item, it keeps the sets to which no other set has both a larger size, counted up
    to `least`, and a lower cost. Of equal sets the first one is kept. No item of the result can be
    left out, unless its cost is 0.

    Args:
        sizes: sizes of the items, > 0.
        costs: costs of the items, >= 0.
        least: the smallest sum of sizes, at most that of all items.

    Returns:
        The items of the set, ascending.
    """
    sets: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for item, (size, own) in enumerate(zip(sizes, costs, strict=True)):
        more = [
            (min(s + size, least), c + own, (*items, item)) for s, c, items in sets if s < least
        ]
        every = sorted([*sets, *more], key=lambda each: (-each[0], each[1]))
        sets, lowest = [], float("inf")
        for each in every:
            if each[1] < lowest:
                lowest = each[1]
                sets.append(each)
    return list(sets[0][2])


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
