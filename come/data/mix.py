"""Calibration windows from several text sources, in given shares and in a mixed order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from come.data.windows import TokenWindows, all_drawn

_TOLERANCE = 1e-6  # of the sum of the shares


def check_shares(key: str, shares: Mapping[str, Any], known: Sequence[str]) -> None:
    """Checks the names of the sources, and that their shares are positive and sum to 1.

    Args:
        key: config key of the shares, for error messages.
        shares: share of every source, by name.
        known: names of the sources that there are.

    Raises:
        ValueError: a name is unknown, a share is no number above 0, or the sum is not 1.
    """
    for name, share in shares.items():
        if name not in known:
            raise ValueError(
                f"{key}: there is no text source {name!r} (available: {', '.join(sorted(known))}); "
                "a dataset is the source hub, with calibration.dataset=NAME or calibration=c4"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
            raise ValueError(f"{key}.{name}={share}: must be a number above 0, or leave it out")
    total = math.fsum(shares.values())
    if not abs(total - 1) <= _TOLERANCE:
        listed = ",".join(f"{name}:{share:g}" for name, share in shares.items())
        raise ValueError(
            f"{key}={{{listed}}}: the shares sum to {total:g} and must sum to 1; "
            "raise or lower one of them"
        )


def window_counts(key: str, shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Divides `total` windows among sources by largest remainder.

    Args:
        key: config key of the shares, for error messages.
        shares: share of every source, by name; see `check_shares`.
        total: `calibration.num_samples`.

    Returns:
        Number of windows of every source, in alphabetical order of the names, so that the order in
        which shares are given does not matter.

    Raises:
        ValueError: a source gets no window; the message says how many windows its share needs.
    """
    whole = math.fsum(shares.values())
    quotas = {name: shares[name] / whole * total for name in sorted(shares)}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            least = math.ceil(whole / shares[name])
            raise ValueError(
                f"{key}.{name}={shares[name]:g} of calibration.num_samples={total} is no window; "
                f"raise the share, or calibration.num_samples to {least}"
            )
    return counts


def interleaved(parts: Sequence[TokenWindows]) -> TokenWindows:
    """The windows of all parts in one order, in which every part is spread evenly.

    Window i of a part with n windows is at (i + 1/2) / n of the order. Merges are fitted to the
    first windows and judged on the last ones, so both have every part in proportion.

    Args:
        parts: windows of equal length, in the order that decides between equal places.
    """
    places = [
        ((row + 0.5) / len(part.windows), number, row)
        for number, part in enumerate(parts)
        for row in range(len(part.windows))
    ]
    rows = [parts[number].windows[row] for _, number, row in sorted(places)]
    return replace(
        parts[0],
        windows=torch.stack(rows),
        corpus_tokens=sum(part.corpus_tokens for part in parts),
        source=" + ".join(part.source for part in parts),
        removed_lines=sum(part.removed_lines for part in parts),
        drawn_from=all_drawn(*(part.drawn_from for part in parts)),
    )
