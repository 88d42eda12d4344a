"""The depth that a merge reaches, and whether a model can be merged to it."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from come.merge.budget import CandidateShape, Share, candidate_shapes, smallest_shape
from come.merge.constraints import (
    DEFAULT_SPARSITY,
    check_groups_kinds,
    check_target,
    layer_kinds,
    layers_for_sparsity,
)
from come.merge.method import groups_target
from come.merge.shape_costs import ParameterShare
from come.merge.width import check_depth
from come.models.width import channels_of, set_channels
from come.schema.merge import MergeSettings

if TYPE_CHECKING:
    from come.models.shape import ModelShape


def stated_target(merge: MergeSettings, num_layers: int) -> int | None:
    """The depth that the settings name; None if it follows from a share of the parameters.

    With `merge.width` alone, all layers are kept.

    Raises:
        ValueError: a group of `merge.groups` is outside the model.
    """
    if merge.groups:
        return groups_target(merge.groups, num_layers)
    if merge.target_layers is not None:
        return merge.target_layers
    if merge.sparsity is None and merge.save_at:
        return min(merge.save_at)
    return num_layers if merge.narrows and merge.sparsity is None else None


def target_layers(merge: MergeSettings, shape: ModelShape) -> int:
    """The depth to reach.

    Raises:
        ValueError: see `stated_target`; or a share of the parameters cannot be removed.
    """
    stated = stated_target(merge, shape.num_layers)
    if stated is not None:
        return stated
    sparsity = DEFAULT_SPARSITY if merge.sparsity is None else merge.sparsity
    each = shape.block_parameters[merge.block]
    target = layers_for_sparsity(sparsity, shape.num_layers, shape.parameters, each)
    rules = merge.constraints(shape.num_layers, target, kinds_of(merge, shape))
    least = rules.smallest_depth(shape.num_layers)
    if 2 <= merge.m <= shape.num_layers and target < least and not rules.remerges:
        largest = (shape.num_layers - least) * each / shape.parameters
        raise ValueError(
            f"merge.sparsity={sparsity} cannot be reached with merge.m={merge.m} unless a merged "
            f"layer is merged again; the largest that can is {largest:.3f} ({least} of "
            f"{shape.num_layers} layers). Ask for less, or set merge.allow_remerge=true (with "
            "merge.schedule=mixed merge.selection=angular in place of optimal_partition)"
        )
    return target


def kinds_of(merge: MergeSettings, shape: ModelShape) -> tuple[Hashable, ...]:
    """What merged layers must have in common; empty if all layers can be merged."""
    return layer_kinds(shape.layouts, merge.kinds, merge.block)


def check_reachable(
    merge: MergeSettings, num_layers: int, target: int, kinds: Sequence[Hashable] = ()
) -> None:
    """Raises ValueError if the target, or a depth of `merge.save_at`, cannot be reached."""
    check_depth(merge, num_layers, target)
    rules = merge.constraints(num_layers, target, kinds)
    check_groups_kinds(merge.groups, rules.kinds)
    if merge.narrows and target == num_layers:
        return
    if not merge.groups:
        check_target(num_layers, target, rules, merge.save_at, merge.schedule.nested)
        merge.schedule.check_depths(num_layers, [*merge.save_at, target])
        return
    sizes = [len(group) for group in merge.groups]
    passed = [num_layers - sum(sizes[:i]) + i for i in range(1, len(sizes) + 1)]
    for depth in merge.save_at:
        if depth not in passed:
            raise ValueError(
                f"merge.save_at has {depth}, and merge.groups passes through "
                f"{', '.join(map(str, dict.fromkeys(passed)))}"
            )


def searched_channels(merge: MergeSettings, shape: ModelShape) -> int:
    """FFN channels of every layer; 0 if the method or the model does not allow fewer."""
    try:
        replace(merge, width=0.5)
        full = channels_of(shape.layouts)
        set_channels(copy.deepcopy(shape.config), max(1, full // 2))
    except ValueError:
        return 0
    return full


def shapes_within_budget(
    merge: MergeSettings, shape: ModelShape, share: Share | None = None
) -> tuple[CandidateShape, ...]:
    """The candidates for `merge.budget`, deepest first.

    Args:
        merge: the settings of the merge.
        shape: the dense model.
        share: the share of the dense model that a shape has; by default that of its parameters,
            or for a budget of time that of its layers' parameters, as an estimate. An estimate
            refuses no budget.

    Raises:
        ValueError: no depth can be reached, or none within the budget.
    """
    budget, full, multiple = merge.budget, searched_channels(merge, shape), merge.width_multiple
    depths = [*([shape.num_layers] if full else []), *_reachable(merge, shape)]
    if share is None:
        share = parameters = ParameterShare.of(shape, full)
        if budget.latency is not None:
            share = replace(parameters, total=sum(parameters.sizes))
            least = smallest_shape(share, depths, full, multiple).share
            budget = replace(budget, latency=max(budget.latency, least))
    return tuple(candidate_shapes(budget, share, depths, full, multiple))


def _reachable(merge: MergeSettings, shape: ModelShape) -> list[int]:
    """The depths below the dense model's that the method can reach."""
    found, layers, kinds = [], shape.num_layers, kinds_of(merge, shape)
    for depth in range(layers - 1, 0, -1):
        try:
            check_reachable(merge, layers, depth, kinds)
        except ValueError:
            continue
        found.append(depth)
    if not found and layers > 1:
        check_reachable(merge, layers, layers - 1, kinds)  # says why
    return found
