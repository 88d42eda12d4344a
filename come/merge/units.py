"""How many units each layer of a span keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from come.merge.unit_scores import UnitScores
from come.models.layout import Unit


def allocate_units(count: int, shares: Sequence[float]) -> list[int]:
    """Splits `count` units by shares.

    The layer with the largest share keeps the remainder; ties go to the first layer. Every other
    layer keeps floor(count * rho_i). A layer may keep none.

    Args:
        count: units of the new layer (KV groups or MLP channels).
        shares: rho of every layer, >= 0, summing to 1.

    Returns:
        Number of units kept of every layer, summing to `count`.
    """
    assert min(shares) >= 0
    assert math.isclose(sum(shares), 1)
    largest = max(range(len(shares)), key=lambda i: shares[i])
    kept = [math.floor(count * share) for share in shares]
    kept[largest] = count - (sum(kept) - kept[largest])
    return kept


def top_units(scores: Float[Tensor, " units"], count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def by_layer(units: list[int], count: int, layers: int) -> list[list[int]]:
    """Splits ascending indices of the units of all layers into lists per layer of `count` units."""
    return [[i - count * layer for i in units if i // count == layer] for layer in range(layers)]


def choose_units(
    scores: UnitScores, shares: Sequence[float], counts: Mapping[Unit, int]
) -> dict[Unit, list[list[int]]]:
    """The most sensitive units of every layer of a span, as many as its share allows.

    Args:
        scores: for each kind of unit, one vector per layer, in depth order.
        shares: rho of every layer.
        counts: units of the new layer, by kind.

    Returns:
        For each kind of unit, one ascending list of indices per layer.
    """
    kept: dict[Unit, list[list[int]]] = {}
    for unit, layers in scores.items():
        own = allocate_units(counts[unit], shares)
        kept[unit] = [top_units(layer, count) for layer, count in zip(layers, own, strict=True)]
    return kept
