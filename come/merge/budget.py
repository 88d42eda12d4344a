"""`merge.budget`: depths and FFN widths that fit a share of the dense model's size or time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

from come.setting import HasSettings, setting

# Optional[...] rather than `X | None`: OmegaConf reads these annotations.
# ruff: noqa: UP045

NARROWEST = 0.25  # share of the FFN channels that a candidate keeps at least
VALIDATION = 8  # windows that compare trials, at most

Share = Callable[[int, int], float]
"""Size or time of a model with (layers, FFN channels of each), divided by the dense model's."""


@dataclass
class Budget(HasSettings):
    """`merge.budget`: what the merged model may need, and how its shape is searched."""

    config_key = "merge.budget"

    parameters: Optional[float] = setting(
        None,
        "largest share of the dense model's parameters; depth and FFN width are searched",
        kind=float,
        above=0,
        below=1,
        optional=True,
    )
    latency: Optional[float] = setting(
        None,
        "largest share of the dense model's time for a prompt, from measured times of its layers",
        kind=float,
        above=0,
        below=1,
        optional=True,
    )
    windows: int = setting(
        16, "calibration windows, from the first, that a trial of a shape is fitted to", least=1
    )

    @property
    def quantity(self) -> str:
        """What is limited: "parameters" or "latency"; "" without a budget."""
        if self.parameters is not None:
            return "parameters"
        return "" if self.latency is None else "latency"

    @property
    def share(self) -> float:
        """The largest share; 1 without a budget."""
        return float(getattr(self, self.quantity)) if self.quantity else 1.0

    def __str__(self) -> str:
        return f"merge.budget.{self.quantity}={self.share:g}"

    def check(self) -> None:
        """Raises ValueError if both kinds of budget are given."""
        if self.parameters is not None and self.latency is not None:
            raise ValueError(
                f"both {self} and merge.budget.latency={self.latency:g} are given; leave one of "
                "them out"
            )


@dataclass(frozen=True)
class CandidateShape:
    """A depth and the FFN width of every layer.

    Attributes:
        layers: number of layers.
        channels: FFN channels of every layer; 0 if its FFN cannot be narrowed.
        width: share of the FFN channels that is kept, as in `merge.width`.
        share: the model's size or time, divided by the dense model's.
        kl: mean KL divergence of a trial's predictions from the dense model's, nats per token;
            None before the trial.
    """

    layers: int
    channels: int
    width: float
    share: float
    kl: float | None = None

    def __str__(self) -> str:
        narrowed = f" with {self.channels} FFN channels" if self.width < 1 else ""
        return f"{self.layers} layers{narrowed}"


def validation_windows(count: int) -> int:
    """How many of the calibration windows, the last ones, compare trials of shapes."""
    return min(VALIDATION, -(-count // 4))


def windows_for(fitted: int) -> int:
    """The fewest calibration windows of which `fitted` are left for trials of shapes."""
    return fitted + min(VALIDATION, -(-fitted // 3))


def widths(full: int, multiple: int) -> list[int]:
    """The widths of candidates: all channels, then multiples down to a quarter of them."""
    least = max(1, math.ceil(NARROWEST * full / multiple))
    return [full, *(multiple * n for n in range((full - 1) // multiple, least - 1, -1))]


def smallest_shape(share: Share, depths: Sequence[int], full: int, multiple: int) -> CandidateShape:
    """The shape with the smallest share; see `candidate_shapes`."""
    layers = min(depths)
    own, channels = min((share(layers, channels), channels) for channels in widths(full, multiple))
    return CandidateShape(layers, channels, channels / full if full else 1.0, own)


def candidate_shapes(
    budget: Budget, share: Share, depths: Sequence[int], full: int, multiple: int
) -> list[CandidateShape]:
    """The widest shape within the budget at every depth, deepest first.

    The last one is the first depth that needs no narrower FFN. Smaller depths would only be worse.

    Args:
        budget: the largest share.
        share: the share of a shape.
        depths: depths that the method can reach.
        full: FFN channels of every layer; 0 if they cannot be narrowed.
        multiple: the number of channels of a narrower FFN is a multiple of this.

    Raises:
        ValueError: no shape is within the budget.
    """
    found: list[CandidateShape] = []
    for layers in sorted(depths, reverse=True):
        for channels in widths(full, multiple):
            own = share(layers, channels)
            if own <= budget.share:
                width = channels / full if full else 1.0
                found.append(CandidateShape(layers, channels, width, own))
                break
        if found and found[-1].width == 1:
            break
    if not found:
        least = smallest_shape(share, depths, full, multiple)
        raise ValueError(
            f"{budget} cannot be reached with this method and model: the smallest share is "
            f"{math.ceil(1000 * least.share) / 1000:.3f} ({least})"
        )
    return found
