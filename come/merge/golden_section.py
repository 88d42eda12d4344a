"""A golden-section search for the lowest value at whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

MOST_EVALUATIONS = 6
_GOLDEN = 0.382  # where it divides an interval: (3 - sqrt 5) / 2


def find_minimum(count: int, value: Callable[[int], float]) -> dict[int, float]:
    """Values at some of the positions 0 .. count - 1, by a golden-section search.

    The first and the last position are always evaluated, and at most `MOST_EVALUATIONS`. If values
    fall and then rise, these find the lowest of up to 9 values.

    Args:
        count: number of positions.
        value: the function.

    Returns:
        The evaluated positions with their values.
    """
    found = {at: value(at) for at in dict.fromkeys((0, count - 1))}
    while len(found) < MOST_EVALUATIONS:
        best = lowest(found)
        below = best - max((at for at in found if at < best), default=best)
        above = min((at for at in found if at > best), default=best) - best
        gap = max(below, above)
        if gap < 2:
            break
        step = max(1, round(_GOLDEN * gap))
        at = best + step if above == gap else best - step
        found[at] = value(at)
    return found


def lowest(values: Mapping[int, float]) -> int:
    """The position with the lowest value; the first one of several."""
    return min(sorted(values), key=values.__getitem__)
