"""A merging method: how spans of layers are chosen, merged and fitted."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from come.merge.constraints import SpanConstraints
from come.merge.norms import Norms
from come.merge.operators.base import OPERATORS
from come.merge.refit.base import REFITS
from come.merge.retention.base import RETENTION
from come.merge.schedules.base import SCHEDULES, SublayerSchedule
from come.merge.schedules.fixed import Fixed
from come.merge.selection.base import SELECTION
from come.merge.sensitivity.base import SENSITIVITY
from come.merge.width import check_width
from come.models.layout import SUBLAYERS, Block, LayerLayout
from come.registry import Registry
from come.setting import HasSettings, setting
from come.statistics.influence import TOKENS, check_tokens

if TYPE_CHECKING:
    from come.merge.operators.base import MergeOperator
    from come.merge.refit.base import Refit
    from come.merge.retention.base import RetentionRule
    from come.merge.schedules.base import Schedule
    from come.merge.selection.base import SpanScore
    from come.merge.sensitivity.base import SensitivityMetric
else:  # a composed configuration holds names and plain data
    MergeOperator = SensitivityMetric = SpanScore = RetentionRule = Schedule = Refit = Any

KINDS = ("same", "first", "last")
PARTS: dict[str, Registry[Any]] = {
    "operator": OPERATORS,
    "sensitivity": SENSITIVITY,
    "selection": SELECTION,
    "retention": RETENTION,
    "schedule": SCHEDULES,
    "refit": REFITS,
}
"""The registries whose entries make up a method."""


def _part(name: str) -> Any:
    """A field for a component of a method; by default the registered one with this name."""
    return field(default=name)


@dataclass
class Method(HasSettings):
    """A merging method; the defaults are the project's own method, `merge=come_plus`.

    Each component is an instance, a registry name, or plain data: `Method(refit="ridge")`,
    `Method(refit=Ridge(lambda_=0.3))`, `Method(refit={"name": "ridge", "lambda": 0.3})`.

    Attributes:
        operator: how a span of layers becomes one layer.
        sensitivity: how channels are scored.
        selection: how spans are scored.
        retention: how much of each layer is kept, and which units.
        schedule: the order in which spans are chosen.
        refit: how the merged layer is fitted to its span.

    Raises:
        ValueError: an unknown name or setting, a value that is not allowed, or components that
            cannot be combined.
    """

    config_key = "merge"

    operator: MergeOperator = _part("concat")
    sensitivity: SensitivityMetric = _part("come")
    selection: SpanScore = _part("trial_kl")
    retention: RetentionRule = _part("adaptive")
    schedule: Schedule = _part("optimal_partition")
    refit: Refit = _part("gauss_newton")
    m: int = setting(
        4,
        "layers of a span, the most of them where the schedule varies sizes; a drop removes m - 1",
        least=2,
    )
    tokens: str = setting(
        "all", "tokens that block influence and cosines read", choices=get_args(TOKENS)
    )
    norms: str = setting(
        "fold",
        "norms of a merged layer: their mean, or folded into the rows that read them",
        choices=get_args(Norms),
    )
    kinds: str = setting(
        "same",
        "which layers may be merged where kinds differ (windows, RoPE): those of the same kind, or "
        "all, into the kind of a span's first or last layer; drops keep any layer",
        choices=KINDS,
    )
    allow_remerge: bool = setting(False, "whether a merged layer may be merged again; drops may")
    protect_first: int = setting(0, "first layers that are neither merged nor dropped", least=0)
    protect_last: int = setting(0, "last layers that are neither merged nor dropped", least=0)
    sublayers: list[str] = setting(
        ["attention", "ffn"], "what is merged: both are whole layers", choices=SUBLAYERS
    )
    groups: list[list[int]] = setting(
        [],
        "spans of original layers to merge, in this order, in place of a choice; a single layer "
        "is refitted",
    )
    width: float = setting(
        1.0, "share of the FFN channels that every layer keeps, after all merges", above=0, most=1
    )
    width_multiple: int = setting(
        64, "the number of FFN channels with merge.width is a multiple of this", least=1
    )
    width_attention: float = setting(
        1.0,
        "share of the KV groups, each with its query heads, that every layer keeps, after all "
        "merges",
        above=0,
        most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, registry in PARTS.items():
            setattr(self, key, registry.build(getattr(self, key)))
        check_groups(self.groups)
        if self.groups:
            self._check_groups()
        self.selection.tokens = check_tokens(self.tokens)
        for part in (self.operator, self.retention, self.schedule, self.selection, self.refit):
            part.check(self)
        check_width(self)

    def _check_groups(self) -> None:
        """Sets the schedule to `Fixed`; raises ValueError for settings that have no effect."""
        single = next((list(group) for group in self.groups if len(group) == 1), None)
        if single and not (self.refit.active and self.refit.target_of(narrower=False) == "dense"):
            raise ValueError(
                f"merge.groups has {single}: a single layer is refitted to the dense model, which "
                f"merge.refit={self.refit.name} with merge.refit.target={self.refit.target} does "
                "not do; choose merge.refit=ridge or gauss_newton with merge.refit.target=dense"
            )
        for key in ("protect_first", "protect_last"):
            if getattr(self, key):
                raise ValueError(
                    f"merge.groups are merged as they are given; merge.{key}={getattr(self, key)} "
                    "has no effect with them"
                )
        fixed = Fixed()
        fixed.groups = self.groups
        self.schedule = fixed

    @property
    def block(self) -> Block:
        """What is merged: whole layers, or one sublayer of each."""
        if sorted(self.sublayers) == sorted(SUBLAYERS):
            return "layer"
        if len(self.sublayers) != 1:
            raise ValueError(
                f"merge.sublayers={list(self.sublayers)}: must be [attention], [ffn] or "
                "[attention,ffn]"
            )
        return "attention" if self.sublayers[0] == "attention" else "ffn"

    @property
    def drops_sublayers(self) -> bool:
        """Whether single sublayers are dropped, in layers that stay."""
        return isinstance(self.schedule, SublayerSchedule)

    def check_layers(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises ValueError if the method cannot work with layers like these."""
        self.refit.check_layers(layouts)
        if isinstance(self.schedule, SublayerSchedule):
            self.schedule.check_layers(layouts)
        kinds = {tuple(sublayer.kind for sublayer in layout) for layout in layouts}
        for own in kinds:
            if self.block != "layer" and set(own) != set(SUBLAYERS):
                raise ValueError(
                    f"merge.sublayers={list(self.sublayers)}: this model has layers without "
                    f"{' and '.join(sorted(set(SUBLAYERS) - set(own)))}; merge whole layers, "
                    "merge.sublayers=[attention,ffn]"
                )

    @property
    def uses_targets(self) -> list[str]:
        """The settings whose components read reconstruction targets."""
        readers = {
            "refit": self.refit.active,
            "selection": self.selection.uses_targets,
            "retention": self.retention.uses_targets,
        }
        return [f"merge.{key}={getattr(self, key).name}" for key, reads in readers.items() if reads]

    @property
    def needs_dense(self) -> bool:
        """Whether the hidden states of the dense model must be stored."""
        towards_dense = self.refit.target_of(narrower=False) == "dense" and bool(self.uses_targets)
        return towards_dense or self.refit.downstream is not None

    @property
    def measures_ahead(self) -> bool:
        """Whether merges after the first read no layer after their span."""
        return self.schedule.plans_ahead and self.retention.local

    @property
    def min_windows(self) -> int:
        """Smallest number of calibration windows that the method needs."""
        return max(self.selection.min_windows, self.retention.min_windows)

    @property
    def remerges(self) -> bool:
        """Whether a layer may be part of several spans."""
        return self.allow_remerge or self.operator.drops

    def slot(self, size: int) -> int:
        """The index in a span of the layer whose kind the merged layer has."""
        return size - 1 if self.kinds == "last" else 0

    def constraints(
        self, num_layers: int, target: int, kinds: Sequence[Hashable] = ()
    ) -> SpanConstraints:
        """Which spans are allowed on the way from `num_layers` to `target` layers.

        `kinds`: what merged layers must have in common (see `layer_kinds`).
        """
        return SpanConstraints(
            m=num_layers - target + 1 if self.schedule.single_span else self.m,
            remerges=self.remerges,
            drops=self.operator.drops,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            variable_size=self.schedule.variable_size,
            kinds=tuple(kinds) if not self.operator.drops else (),
        )

    def fresh(self) -> Method:
        """A deep copy, so that a compression leaves no state in this method."""
        return copy.deepcopy(self)

    def record(self) -> dict[str, Any]:
        """All names and settings, as plain data."""
        parts = {
            key: {"name": getattr(self, key).name, **getattr(self, key).record()} for key in PARTS
        }
        own = {key: getattr(self, entry.name) for key, entry in Method.settings().items()}
        return {**parts, **own}

    def equals(self, record: Any) -> bool:
        """Whether a record, for example from a JSON file, describes this method."""
        return bool(json.loads(json.dumps(Method.record(self))) == record)


def groups_target(groups: Sequence[Sequence[int]], num_layers: int) -> int:
    """The depth after all spans in `groups` are merged.

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
    """Raises ValueError unless each group is one or more adjacent layers and none overlap.

    At least one group has several layers: a single layer is refitted to what it should give after
    the merges before it.
    """
    seen: set[int] = set()
    for group in groups:
        adjacent = list(group) == list(range(group[0], group[0] + len(group))) if group else False
        if not adjacent or group[0] < 0:
            raise ValueError(
                f"merge.groups has {list(group)}: a group is adjacent layers, counted from 0, such "
                "as [3,4], or one layer to refit"
            )
        if seen & set(group):
            raise ValueError(f"merge.groups: layer {min(seen & set(group))} is in two groups")
        seen |= set(group)
    if groups and max(map(len, groups)) == 1:
        raise ValueError(
            f"merge.groups={[list(group) for group in groups]} merges nothing: give at least one "
            "group of several layers, such as [3,4]"
        )
