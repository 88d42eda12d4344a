"""The progressive loop: measure, choose a group, merge it, measure again what lies behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from come.calibration.influence import check_tokens
from come.calibration.statistics import LayerStatistics, StatisticsCollector
from come.calibration.stream import LayerStream
from come.merging.apply import apply, apply_step
from come.merging.norms import check_norms
from come.merging.plan import BaseModel, GroupCandidate, MergeStep, Plan
from come.merging.schedule import check_target, eligible_groups
from come.merging.units import allocate_units, top_units
from come.models.adapter import UNITS, ModelAdapter, Unit
from come.operators.base import OPERATORS, MergeOperator
from come.retention.base import RETENTION, RetentionRule
from come.selection.base import SELECTION, GroupScore
from come.sensitivity.base import SENSITIVITY, SensitivityMetric


@dataclass(frozen=True)
class Recipe:
    """A merging method: four registry names and their settings. The default is CoMe's.

    Attributes:
        operator: how a group becomes one layer.
        sensitivity: how channels are scored.
        selection: how groups are scored.
        retention: how much each layer keeps.
        m: layers of a group.
        p: skewness exponent of the retention shares.
        tokens: which tokens count for BI and SBI, "all" or "last" of each window.
        norms: "mean", or "fold" to keep every row's own norm scale.
        allow_remerge: whether a merged layer may be merged again.
        seed: of random choices.
        options: further constructor settings of the registered parts.

    Raises:
        ValueError: an unknown name, m < 2, or a setting that no part knows or that is out of range.
    """

    operator: str = "concat"
    sensitivity: str = "come"
    selection: str = "sbi"
    retention: str = "bi_power"
    m: int = 2
    p: float = 1.0
    tokens: str = "last"
    norms: str = "mean"
    allow_remerge: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.m < 2:
            raise ValueError(f"merge.m={self.m}: a group has at least 2 layers")
        check_norms(self.norms)
        check_tokens(self.tokens)
        known = {
            *OPERATORS.options(self.operator),
            *SENSITIVITY.options(self.sensitivity),
            *SELECTION.options(self.selection),
            *RETENTION.options(self.retention),
        }
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"merge.options.{option}: no chosen part has this setting; known are "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        self.build()

    def build(self) -> tuple[MergeOperator, SensitivityMetric, GroupScore, RetentionRule]:
        """The four parts, made from the settings."""
        settings = {"p": self.p, "tokens": self.tokens, "seed": self.seed, **self.options}
        return (
            OPERATORS.create(self.operator, settings),
            SENSITIVITY.create(self.sensitivity, settings),
            SELECTION.create(self.selection, settings),
            RETENTION.create(self.retention, settings),
        )


def base_model(adapter: ModelAdapter, name: str = "", fingerprint: str = "") -> BaseModel:
    """Describes a dense model for a plan."""
    return BaseModel(
        name=name or str(adapter.config.name_or_path),
        fingerprint=fingerprint,
        model_type=adapter.architecture.model_type,
        num_layers=adapter.num_layers,
        units=adapter.unit_counts,
    )


def compress(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows seq"],
    recipe: Recipe | None = None,
    *,
    target_layers: int,
    plan: Plan | None = None,
    on_step: Callable[[Plan], None] | None = None,
    on_first_layer: Callable[[float], None] | None = None,
    batch_size: int = 4,
    store: str = "memory",
    folder: Path | None = None,
    progress: bool = True,
) -> Plan:
    """Merges groups of layers, in place, until the model has `target_layers` layers.

    Source: arXiv 2510.15304, the progressive strategy. Statistics are measured again after every
    merge, on the model as it then is, for the merged layer and all behind it; nothing in front
    of it can have changed.

    Args:
        model: the dense model, changed in place (also by an interrupted call).
        windows: calibration windows, packed, without padding, int64.
        recipe: the method; None for CoMe's.
        target_layers: depth to reach.
        plan: an empty plan that describes the base model, or one of an interrupted call: its
            steps are applied first.
        on_step: called with the plan after every merge, while the model is at that depth.
        on_first_layer: called with the seconds that the first layer's pass took.
        batch_size: windows in one batch.
        store: where boundaries are kept, "memory" or "disk".
        folder: where the disk store's files go.
        progress: whether to show a progress bar.

    Returns:
        The plan: every decision, and the merge history.

    Raises:
        ValueError: an unsupported model, a target that does not fit or cannot be reached, or
            hidden states that are not finite.
    """
    recipe = recipe or Recipe()
    operator, metric, selection, retention = recipe.build()
    adapter = ModelAdapter(model)
    check_target(adapter.num_layers, target_layers, recipe.m, recipe.allow_remerge)
    if plan is None:
        plan = Plan(
            base_model(adapter),
            recipe.operator,
            recipe.norms,
            provenance={"recipe": asdict(recipe)},
        )
    apply(plan, model)

    collector = StatisticsCollector(adapter, metric, check_tokens(recipe.tokens))
    statistics: list[LayerStatistics] = []
    scores: dict[tuple[int, int], float] = {}
    start = 0
    stream = LayerStream(
        adapter, windows, batch_size=batch_size, store=store, folder=folder, progress=progress
    )
    with stream:
        while adapter.num_layers > target_layers:
            collector.spans = plan.history
            if not statistics:
                stream.embed()
                began = time.perf_counter()
                stream.advance(0, 0, collector)
                if on_first_layer:
                    on_first_layer(time.perf_counter() - began)
                stream.advance(1, adapter.num_layers - 1, collector)
            else:
                stream.advance(start, adapter.num_layers - 1, collector)
            statistics[start:] = [collector.found[i] for i in range(start, adapter.num_layers)]
            _check_finite(statistics)

            groups = eligible_groups(plan.history, target_layers, recipe.m, recipe.allow_remerge)
            scores = {group: value for group, value in scores.items() if group[1] < start}
            for group in groups:
                if group not in scores:
                    scores[group] = selection.score(stream, *group)
            candidates = [GroupCandidate(*group, scores[group]) for group in groups]
            best = min(candidates, key=lambda candidate: candidate.score)

            group_statistics = statistics[best.first : best.last + 1]
            shares = retention.shares(group_statistics)
            step = MergeStep(
                first=best.first,
                last=best.last,
                spans=plan.history[best.first : best.last + 1],
                shares=shares,
                kept=choose_units(group_statistics, shares) if operator.uses_units else {},
                score=best.score,
                candidates=candidates,
                bi=[layer.bi for layer in statistics],
            )
            apply_step(adapter, step, operator, recipe.norms)
            stream.merged(step.first, step.last)
            plan = plan.with_step(step)
            start = step.first
            if on_step:
                on_step(plan)
    return plan


def choose_units(group: list[LayerStatistics], shares: list[float]) -> dict[Unit, list[list[int]]]:
    """The kept units of every layer of a group: the most sensitive ones, as many as its share.

    Args:
        group: statistics of the group's layers, in depth order.
        shares: rho of every layer.

    Returns:
        For each kind of unit one ascending list of indices a layer.
    """
    kept: dict[Unit, list[list[int]]] = {}
    for unit in UNITS:
        counts = allocate_units(len(group[0].scores[unit]), shares)
        kept[unit] = [
            top_units(layer.scores[unit], count) for layer, count in zip(group, counts, strict=True)
        ]
    return kept


def _check_finite(statistics: list[LayerStatistics]) -> None:
    for index, layer in enumerate(statistics):
        if not math.isfinite(layer.bi):
            raise ValueError(
                f"the hidden states behind layer {index} are not finite; "
                "try model.dtype=float32 or bfloat16"
            )
