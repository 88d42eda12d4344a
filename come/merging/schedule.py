"""Which groups may be merged next, which depths can be reached, and what the passes cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from come.models.surgery import Span


def smallest_depth(num_layers: int, m: int, allow_remerge: bool) -> int:
    """The smallest depth that groups of at most `m` can reach.

    Without merging a layer twice floor(L/m) full groups fit, and the last step may take fewer.
    """
    if allow_remerge:
        return 1
    full, left = divmod(num_layers, m)
    return num_layers - full * (m - 1) - max(0, left - 1)


def group_size(depth: int, target: int, m: int) -> int:
    """Layers that the next merge takes: m, or fewer where the last step has to land exactly."""
    return min(m, depth - target + 1)


def eligible_groups(
    history: Sequence[Span], target: int, m: int, allow_remerge: bool
) -> list[tuple[int, int]]:
    """Groups (first, last) that may be merged next so that `target` stays reachable.

    Args:
        history: original layers behind every layer of the current model.
        target: the depth to reach, below the current one.
        m: the size of a group.
        allow_remerge: whether a merged layer may be merged again.
    """
    depth = len(history)
    size = group_size(depth, target, m)
    assert size >= 2
    groups = [(first, first + size - 1) for first in range(depth - size + 1)]
    if allow_remerge:
        return groups
    merged = [len(span) > 1 for span in history]
    eligible = []
    for first, last in groups:
        if any(merged[first : last + 1]):
            continue
        after = [*merged[:first], True, *merged[last + 1 :]]
        if _reachable(_runs(after), depth - size + 1 - target, m):
            eligible.append((first, last))
    return eligible


def _runs(merged: Sequence[bool]) -> list[int]:
    """Lengths of the stretches of layers that have not been merged."""
    runs, length = [], 0
    for flag in [*merged, True]:
        if flag:
            runs.append(length)
            length = 0
        else:
            length += 1
    return [run for run in runs if run >= 2]


def _reachable(runs: Sequence[int], excess: int, m: int) -> bool:
    """Whether groups of m, and one smaller group at the end, can remove `excess` more layers."""
    full, rest = divmod(excess, m - 1)
    if rest == 0:
        return sum(run // m for run in runs) >= full
    return any(
        run >= rest + 1
        and sum(other // m for j, other in enumerate(runs) if j != i) + (run - rest - 1) // m
        >= full
        for i, run in enumerate(runs)
    )


def depths(num_layers: int, target: int, m: int) -> list[int]:
    """The depths after every merge on the way to `target`."""
    result = []
    depth = num_layers
    while depth > target:
        depth -= group_size(depth, target, m) - 1
        result.append(depth)
    return result


def check_target(
    num_layers: int, target: int, m: int, allow_remerge: bool, save_at: Iterable[int] = ()
) -> None:
    """Checks a target depth against the model's.

    Raises:
        ValueError: m or the target does not fit the model, the target cannot be reached without
            merging a layer twice, or a depth of `save_at` is not passed on the way.
    """
    if not 2 <= m <= num_layers:
        raise ValueError(
            f"merge.m={m}: a group has at least 2 layers and at most the model's {num_layers}"
        )
    if not 1 <= target < num_layers:
        raise ValueError(
            f"merge.target_layers={target}: the model has {num_layers} layers, so a target is "
            f"from 1 to {num_layers - 1}"
        )
    least = smallest_depth(num_layers, m, allow_remerge)
    if target < least:
        raise ValueError(
            f"{target} of {num_layers} layers cannot be reached with merge.m={m} unless a merged "
            f"layer is merged again; the smallest depth that can is {least}. Ask for at least "
            f"{least} layers, or set merge.allow_remerge=true"
        )
    passed = depths(num_layers, target, m)
    for depth in save_at:
        if depth not in passed:
            raise ValueError(
                f"merge.save_at has {depth}, which is not a depth on the way to {target} layers "
                f"with merge.m={m}: {', '.join(map(str, passed))}"
            )


def layers_for_sparsity(
    sparsity: float, config: PretrainedConfig, total: int, per_layer: int
) -> int:
    """The number of layers whose removal comes nearest to a share of all parameters.

    Args:
        sparsity: share of the model's parameters to remove, in (0, 1).
        config: the model's configuration.
        total: parameters of the model, tied ones once.
        per_layer: parameters of one decoder layer.

    Returns:
        The target depth.

    Raises:
        ValueError: the share is so small that no layer goes, or larger than all layers but one.
    """
    layers = config.num_hidden_layers
    removed = round(sparsity * total / per_layer)
    if removed < 1:
        raise ValueError(
            f"merge.sparsity={sparsity} is less than half a layer; one layer of this model is "
            f"{per_layer / total:.4f} of its parameters"
        )
    if removed >= layers:
        raise ValueError(
            f"merge.sparsity={sparsity} is more than merging can reach: with one layer left, "
            f"{(layers - 1) * per_layer / total:.4f} of the parameters are gone"
        )
    return layers - removed


def layer_passes(num_layers: int, steps: Sequence[tuple[int, int]]) -> int:
    """Passes of all windows over one layer that a progressive run makes necessary.

    One full pass, and after every merge but the last the merged layer and all behind it.

    Args:
        num_layers: layers of the dense model.
        steps: (first, last) of every merged group, in positions of the model at that step.
    """
    passes, depth = num_layers, num_layers
    for first, last in steps[:-1]:
        depth -= last - first
        passes += depth - first
    return passes
