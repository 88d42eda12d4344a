"""The interface of retention rules, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from come.merge.combination import Combination
from come.merge.span import LayerSpan, UnitAllocation
from come.merge.units import choose_units
from come.merge.work import SpanSize, Work
from come.registry import Registry
from come.setting import HasSettings


@dataclass(eq=False)
class RetentionRule(HasSettings, ABC):
    """Decides how much of each layer of a span is kept, and which units.

    Class attributes:
        name: the registry name, equal to the file's.
        paper: arXiv id of the source, or "".
        source: where the formula is defined, in words.
        needs_units: whether it works only with operators that use units.
        trials: whether it runs trial merges.
        min_windows: smallest number of calibration windows that it needs.
        uses_targets: whether it reads the reconstruction targets.
        uses_scores: whether it uses the sensitivity metric.
        solves: whether unit selection for a trial merge also solves for the output projections.
        local: whether it does not depend on the layers after the span: it reads no unit scores,
            which may need gradients, and no loss.
    """

    config_key = "merge.retention"
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_units: ClassVar[bool] = False
    trials: ClassVar[bool] = False
    uses_targets: ClassVar[bool] = False
    min_windows: ClassVar[int] = 1
    uses_scores: ClassVar[bool] = True
    solves: ClassVar[bool] = False
    local: ClassVar[bool] = False

    def check(self, method: Combination) -> None:
        """Raises ValueError if the rule cannot be combined with the method's components."""
        if self.needs_units and not method.operator.uses_units:
            raise ValueError(
                f"merge.retention={self.name} ranks units, and merge.operator="
                f"{method.operator.name} does not use them; choose merge.operator=concat"
            )
        metric = method.sensitivity.name
        if metric != "come" and not (method.operator.uses_units and self.uses_scores):
            reason = f"merge.retention={self.name}"
            if not method.operator.uses_units:
                reason = f"merge.operator={method.operator.name}"
            raise ValueError(
                f"merge.sensitivity={metric} has no effect with {reason}, which does not use "
                "sensitivities; use merge=come, or merge.retention=bi_power merge.operator=concat"
            )

    @abstractmethod
    def shares(self, span: LayerSpan) -> list[float]:
        """Share rho_i of every layer of the span, in depth order; >= 0, summing to 1."""

    def work(self, size: SpanSize) -> Work:
        """The work of choosing the units of one span; zero for rules without an estimate."""
        return Work()

    def split(self, span: LayerSpan) -> UnitAllocation:
        """The shares, and in each layer the most sensitive units, as many as its share allows.

        Rules that rank the units of several layers together override this.
        """
        return with_units(self.shares(span), span)

    def trial_split(self, span: LayerSpan) -> UnitAllocation:
        """The unit allocation of a trial merge; may approximate `split`."""
        return self.split(span)


def with_units(shares: Sequence[float], span: LayerSpan) -> UnitAllocation:
    """The shares, with the most sensitive units of every layer if there are scores."""
    kept = choose_units(span.scores, shares, span.unit_counts) if span.scores else {}
    return UnitAllocation(list(shares), kept)


RETENTION: Registry[RetentionRule] = Registry(
    "retention rule", "come.merge.retention", "merge.retention"
)
