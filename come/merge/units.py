"""How many units each layer of a group keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.unit_scores import UnitScores
from come.models.adapter import Unit


def allocate_units(count: int, shares: Sequence[float]) -> list[int]:
    """Splits `count` units by shares.

    Every layer but the one with the largest share keeps floor(count * rho_i); that one, the
    first of them if several are largest, keeps the remainder. A layer may end with none.

    Args:
        count: units of one layer (KV groups or FFN channels).
        shares: rho of every layer, >= 0, summing to 1.

    Returns:
        Units kept of every layer, summing to `count`.
    """
    assert min(shares) >= 0
    assert math.isclose(sum(shares), 1)
    largest = max(range(len(shares)), key=lambda i: shares[i])
    kept = [math.floor(count * share) for share in shares]
    kept[largest] = count - (sum(kept) - kept[largest])
    return kept


def top_units(scores: Float[Tensor, " units"], count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; of equal scores the lower index wins."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def choose_units(scores: UnitScores, shares: Sequence[float]) -> dict[Unit, list[list[int]]]:
    """The kept units of every layer of a group: the most sensitive ones, as many as its share.

    Args:
        scores: for each kind of unit one vector a layer, in depth order.
        shares: rho of every layer.

    Returns:
        For each kind of unit one ascending list of indices a layer.
    """
    kept: dict[Unit, list[list[int]]] = {}
    for unit, layers in scores.items():
        counts = allocate_units(len(layers[0]), shares)
        kept[unit] = [top_units(layer, count) for layer, count in zip(layers, counts, strict=True)]
    return kept
