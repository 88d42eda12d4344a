"""A method: registry names and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from come.linalg.gram import check_lambda
from come.merge.constraints import SpanConstraints
from come.merge.norms import check_norms
from come.merge.operators.base import OPERATORS, MergeOperator
from come.merge.reconstruction import check_refit_target, check_weighting
from come.merge.refit.base import REFITS, Refit
from come.merge.retention.base import RETENTION, RetentionRule
from come.merge.schedules.base import SCHEDULES, Schedule
from come.merge.selection.base import SELECTION, GroupScore
from come.merge.sensitivity.base import SENSITIVITY, SensitivityMetric
from come.models.adapter import Block
from come.statistics.influence import check_tokens

COME_PLUS: dict[str, Any] = {
    "operator": "concat",
    "schedule": "optimal_partition",
    "m": 4,
    "selection": "trial_kl",
    "retention": "adaptive",
    "tokens": "all",
    "norms": "fold",
    "refit": "gauss_newton",
    "refit_lambda": 0.1,
    "align_lambda": 0.01,
    "target": "dense",
}
"""What `merge=come_plus` sets, the default of `run.py`."""


@dataclass(frozen=True)
class Recipe:
    """A merging method: six registry names and their settings. The default is the paper's CoMe.

    Attributes:
        operator: how a group becomes one layer.
        sensitivity: how channels are scored.
        selection: how spans of layers are scored.
        retention: how much each layer keeps.
        schedule: in which order groups are chosen.
        m: layers of a group, or the most where the schedule mixes sizes; a drop leaves m - 1
            layers out at a time.
        p: skewness exponent of the retention shares.
        tokens: which tokens count for BI, SBI and cosines, "all" or "last" of each window.
        norms: "mean", or "fold" to keep every row's own norm scale.
        allow_remerge: whether a merged layer may be merged again; drops may.
        protect_first: layers at the front that are neither merged nor dropped. (A repair may still
            write into them: ReplaceMe into the layer in front of what it drops.)
        protect_last: layers at the end that are neither merged nor dropped.
        parts: what is merged: attention, ffn, or both, which is whole layers.
        groups: groups of original layers to merge, in this order, instead of a choice.
        refit: how the merged layer is fitted to what its group did.
        refit_lambda: penalty on the distance from the operator's weights, relative to the mean
            diagonal of the Gram matrix, or "auto".
        refit_parts: which output maps are refitted, attention and ffn.
        refit_weights: of tokens, "relative" to the size of their states, or "equal".
        align_lambda: penalty of fitting input maps to what the merged layer reads, relative as
            `refit_lambda`; None to leave them as they are.
        target: whose states are refitted to, of the "dense" or of the "current" model.
        finish_lambda: penalty of a last refit of all layers behind the first merge; None for none.
        seed: of random choices.
        options: further constructor settings of the registered parts.

    Raises:
        ValueError: an unknown name, m < 2, or a setting that no part knows or that is out of range.
    """

    operator: str = "concat"
    sensitivity: str = "come"
    selection: str = "sbi"
    retention: str = "bi_power"
    schedule: str = "progressive"
    m: int = 2
    p: float = 1.0
    tokens: str = "last"
    norms: str = "mean"
    allow_remerge: bool = False
    protect_first: int = 0
    protect_last: int = 0
    parts: Sequence[str] = ("attention", "ffn")
    groups: Sequence[Sequence[int]] = ()
    refit: str = "none"
    refit_lambda: Any = 0.1
    refit_parts: Sequence[str] = ("attention", "ffn")
    refit_weights: str = "relative"
    align_lambda: float | None = None
    target: str = "dense"
    finish_lambda: float | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def come_plus(cls, **changes: Any) -> Recipe:
        """The project's own method, `merge=come_plus`; `changes` are settings of a recipe."""
        return cls(**COME_PLUS | changes)

    def same(self, record: Any) -> bool:
        """Whether what a plan's provenance holds is this recipe, read back from a file or not."""
        return bool(json.loads(json.dumps(asdict(self))) == json.loads(json.dumps(record)))

    def __post_init__(self) -> None:
        if self.m < 2:
            raise ValueError(f"merge.m={self.m}: a group has at least 2 layers")
        for key in ("protect_first", "protect_last"):
            if getattr(self, key) < 0:
                raise ValueError(f"merge.{key}={getattr(self, key)}: must be at least 0")
        check_norms(self.norms)
        check_tokens(self.tokens)
        check_groups(self.groups)
        if self.schedule == "fixed" and not self.groups:
            raise ValueError("merge.schedule=fixed needs merge.groups, such as [[3,4],[10,11,12]]")
        operator = OPERATORS.get(self.operator)
        known = {
            *OPERATORS.options(self.operator),
            *SENSITIVITY.options(self.sensitivity),
            *SELECTION.options(self.selection),
            *RETENTION.options(self.retention),
            *SCHEDULES.options(self.schedule),
            *REFITS.options(self.refit),
        }
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"merge.options.{option}: no chosen part has this setting; known are "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        for key in ("schedule", "protect_first", "protect_last"):
            unasked = (0, "progressive", "fixed", COME_PLUS["schedule"])
            if self.groups and getattr(self, key) not in unasked:
                raise ValueError(
                    f"merge.groups are merged as they are given; merge.{key}={getattr(self, key)} "
                    "has no meaning with them"
                )
        for option in self.options:
            if option in self.__dataclass_fields__:
                raise ValueError(f"merge.options.{option} is a setting of its own: merge.{option}")
        if RETENTION.get(self.retention).needs_units and not operator.uses_units:
            raise ValueError(
                f"merge.retention={self.retention} ranks units, and merge.operator="
                f"{self.operator} does not use them; choose merge.operator=concat"
            )
        self._check_effect(operator)
        if operator.needs_layer_before and not self.groups and self.protect_first < 1:
            raise ValueError(
                f"merge.operator={self.operator} needs a layer in front of what it drops: "
                "set merge.protect_first=1 or more"
            )
        if self.allow_remerge and not SCHEDULES.get(self.schedule_name).remerges:
            raise ValueError(
                f"merge.schedule={self.schedule} adds costs of the dense model's layers, so "
                "merge.allow_remerge=true is not possible with it; choose merge.schedule=mixed "
                "merge.selection=angular"
            )
        if SCHEDULES.get(self.schedule_name).variable_size and operator.drops:
            raise ValueError(
                f"merge.schedule={self.schedule} weighs sizes of merged groups, and "
                f"merge.operator={self.operator} drops layers; choose merge.schedule=progressive"
            )
        if not SCHEDULES.get(self.schedule_name).remeasures:
            self._check_one_shot(operator)
        if self.block != "layer" and operator.solves:
            raise ValueError(
                f"merge.operator={self.operator} solves for whole layers; "
                f"merge.parts={list(self.parts)} is not possible with it"
            )
        self._check_refit(operator)
        self.make()

    def _check_effect(self, operator: type[MergeOperator]) -> None:
        """Refuses a metric or an exponent that nothing would ask."""
        rule = RETENTION.get(self.retention)
        asked = operator.uses_units and rule.uses_scores
        if self.sensitivity != "come" and not asked:
            silent = f"merge.retention={self.retention}" if operator.uses_units else operator.name
            raise ValueError(
                f"merge.sensitivity={self.sensitivity} would have no effect: {silent} asks no "
                "sensitivity. merge=come does, or merge.retention=bi_power merge.operator=concat"
            )
        rules = RETENTION.options(self.retention)
        if self.p != 1 and ("p" not in rules or operator.drops or operator.solves):
            silent = f"merge.retention={self.retention} has no exponent"
            silent = f"{operator.name} keeps no shares" if "p" in rules else silent
            raise ValueError(
                f"merge.p={self.p} would have no effect: {silent}; merge.retention=bi_power "
                "merge.operator=concat has"
            )

    def _check_refit(self, operator: type[MergeOperator]) -> None:
        """What a repair cannot be combined with."""
        check_refit_target(self.target)
        check_weighting(self.refit_weights)
        check_lambda("merge.refit_lambda", self.refit_lambda)
        for setting in ("finish_lambda", "align_lambda"):
            value = getattr(self, setting)
            if value is not None and not value > 0:
                raise ValueError(f"merge.{setting}={value}: must be above 0, or null")
        if self.align_lambda is not None:
            self._check_align()
        ignored = self.groups and self.selection == COME_PLUS["selection"]  # unasked
        ranks = ignored or SCHEDULES.get(self.schedule_name).ranks
        if SELECTION.get(self.selection).shortlist and not ranks:
            other = "merge.groups" if self.groups else f"merge.schedule={self.schedule}"
            raise ValueError(
                f"merge.selection={self.selection} merges a shortlist on trial, and {other} leaves "
                "it no choice: choose another selection, such as merge.selection=angular"
            )
        schedule = SCHEDULES.get(self.schedule_name)
        if operator.solves and (SELECTION.get(self.selection).shortlist or schedule.trials):
            trying = f"merge.schedule={self.schedule}"
            trying = trying if schedule.trials else f"merge.selection={self.selection}"
            raise ValueError(
                f"{trying} merges on trial without what merge.operator={self.operator} solves for: "
                "choose another, such as merge.schedule=block merge.selection=angular"
            )
        key = next(iter(self._goal_users()), None)
        if self.finish_lambda is not None and key is None:
            key = "merge.finish_lambda"
        if key is None:
            return
        if operator.solves:
            raise ValueError(
                f"merge.operator={self.operator} solves for the layer itself; {key} is not "
                "possible with it: choose merge.operator=drop or concat"
            )
        if self.block != "layer":
            raise ValueError(
                f"{key} repairs whole layers; merge.parts={list(self.parts)} is not possible "
                "with it"
            )

    def _check_align(self) -> None:
        """What the alignment of input maps needs."""
        key = f"merge.align_lambda={self.align_lambda}"
        if not REFITS.get(self.refit).active:
            raise ValueError(
                f"{key} would have no effect: the refit aligns input maps, and merge.refit="
                f"{self.refit}; choose merge.refit=ridge or merge.align_lambda=null"
            )
        if self.norms != "fold":
            raise ValueError(
                f"{key} fits rows that carry their own norm scale, and merge.norms={self.norms} "
                "averages the scales; choose merge.norms=fold"
            )

    def _check_one_shot(self, operator: type[MergeOperator]) -> None:
        """What a schedule that measures the dense model once cannot do."""
        reason = None
        if operator.drops and self.m != 2:
            reason = f"drops single layers; merge.m={self.m} is not possible with it"
        elif self.allow_remerge and not operator.drops:
            reason = "measures the dense model once, so merge.allow_remerge=true is not possible"
        elif operator.solves:
            reason = f"measures the dense model once, and merge.operator={self.operator} solves on "
            reason += "the model as it is; choose merge.schedule=progressive or block"
        if reason:
            raise ValueError(f"merge.schedule={self.schedule} {reason}")

    def _goal_users(self) -> list[str]:
        """The settings whose parts read what a merged layer has to reproduce."""
        users = {
            f"merge.refit={self.refit}": REFITS.get(self.refit).active,
            f"merge.selection={self.selection}": SELECTION.get(self.selection).uses_goals,
            f"merge.retention={self.retention}": RETENTION.get(self.retention).uses_goals,
        }
        return [key for key, reads in users.items() if reads]

    @property
    def wants_dense(self) -> bool:
        """Whether the dense model's states have to be kept."""
        towards_dense = self.target == "dense" and bool(self._goal_users())
        return towards_dense or self.finish_lambda is not None

    @property
    def least_windows(self) -> int:
        """Calibration windows that the method needs."""
        parts = SELECTION.get(self.selection), RETENTION.get(self.retention)
        return max(part.min_windows for part in parts)

    @property
    def remerges(self) -> bool:
        """Whether a layer may be part of several groups."""
        return self.allow_remerge or OPERATORS.get(self.operator).drops

    @property
    def schedule_name(self) -> str:
        """The schedule that is used: groups given by hand take the place of any other."""
        return "fixed" if self.groups else self.schedule

    @property
    def nested(self) -> bool:
        """Whether one run passes through all depths on the way to its target."""
        return SCHEDULES.get(self.schedule_name).nested

    def rules(self, num_layers: int, target: int) -> SpanConstraints:
        """Which groups are allowed on the way from `num_layers` to `target` layers."""
        return SpanConstraints(
            m=num_layers - target + 1 if SCHEDULES.get(self.schedule_name).whole else self.m,
            remerges=self.remerges,
            drops=OPERATORS.get(self.operator).drops,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            variable_size=SCHEDULES.get(self.schedule_name).variable_size,
        )

    @property
    def block(self) -> Block:
        """What is merged: whole layers, or one part of each."""
        chosen = list(self.parts)
        if sorted(chosen) == ["attention", "ffn"]:
            return "layer"
        if chosen == ["attention"]:
            return "attention"
        if chosen == ["ffn"]:
            return "ffn"
        raise ValueError(
            f"merge.parts={chosen}: allowed are [attention], [ffn] and [attention,ffn]"
        )

    def make(
        self,
    ) -> tuple[MergeOperator, SensitivityMetric, GroupScore, RetentionRule, Schedule, Refit]:
        """The parts, made anew from the settings."""
        settings = {
            "p": self.p,
            "tokens": self.tokens,
            "seed": self.seed,
            "groups": self.groups,
            "refit_lambda": self.refit_lambda,
            "refit_parts": self.refit_parts,
            "align_lambda": self.align_lambda,
            **self.options,
        }
        return (
            OPERATORS.create(self.operator, settings),
            SENSITIVITY.create(self.sensitivity, settings),
            SELECTION.create(self.selection, settings),
            RETENTION.create(self.retention, settings),
            SCHEDULES.create(self.schedule_name, settings),
            REFITS.create(self.refit, settings),
        )


def groups_target(groups: Sequence[Sequence[int]], num_layers: int) -> int:
    """The depth that groups given by hand lead to.

    Raises:
        ValueError: a group is outside the model.
    """
    for group in groups:
        if group[-1] >= num_layers:
            raise ValueError(
                f"merge.groups has {list(group)}, and the model's layers are 0 to {num_layers - 1}"
            )
    return num_layers - sum(len(group) - 1 for group in groups)


def check_groups(groups: Sequence[Sequence[int]]) -> None:
    """Raises ValueError unless groups are adjacent ascending layers and do not overlap."""
    seen: set[int] = set()
    for group in groups:
        adjacent = list(group) == list(range(group[0], group[0] + len(group))) if group else False
        if len(group) < 2 or not adjacent or group[0] < 0:
            raise ValueError(
                f"merge.groups has {list(group)}: a group is two or more adjacent layers, counted "
                "from 0, such as [3,4]"
            )
        if seen & set(group):
            raise ValueError(f"merge.groups: layer {min(seen & set(group))} stands in two groups")
        seen |= set(group)
