"""Which spans may be merged next, and which depths can be reached."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from come.models.layout import Block, LayerLayout
from come.models.surgery import Span

Drop = TypeVar("Drop", bound=Sequence[int])
DEFAULT_SPARSITY = 0.10  # share of the parameters that is removed unless a depth is given


def smallest_depth(num_layers: int, m: int, allow_remerge: bool, protected: int = 0) -> int:
    """The smallest depth that spans of at most `m` layers can reach.

    Without remerging, floor(n/m) full spans fit into the n unprotected layers, and the last span
    may be smaller.
    """
    free = num_layers - protected
    if allow_remerge:
        return protected + min(1, free)
    full, left = divmod(free, m)
    return num_layers - full * (m - 1) - max(0, left - 1)


def span_size(depth: int, target: int, m: int) -> int:
    """Layers of the next span: m, or fewer if the last merge must reach the target exactly."""
    return min(m, depth - target + 1)


def layer_kinds(layouts: Sequence[LayerLayout], rule: str, block: Block) -> tuple[Hashable, ...]:
    """What layers must have in common to be merged; empty if all layers can be.

    Args:
        layouts: the layers of the model.
        rule: `merge.kinds`; unless it is "same", layers only need the same tensors.
        block: what is merged.
    """
    parts = [tuple(layout.of(block)) for layout in layouts]
    kinds = [(layout.kind, own) for layout, own in zip(layouts, parts, strict=True)]
    found: list[Hashable] = [*(kinds if rule == "same" else parts)]
    return tuple(found) if len(set(found)) > 1 else ()


@dataclass(frozen=True)
class SpanConstraints:
    """Which spans are allowed.

    Attributes:
        kinds: what the layers of a span must have in common, by original layer; empty if all have.
        m: layers of a span; a drop removes m - 1 of them.
        needed: by layer of the current model, whether it is of the kind of which a drop must leave
            one; empty if there is no such kind.
        needs_last: whether a drop must leave a layer of that kind as the last one.
        variable_size: whether a span may have fewer layers.
        remerges: whether a merged layer may be merged again.
        drops: whether the scored spans are dropped instead of merged.
        protect_first: number of first layers that are neither merged nor dropped.
        protect_last: number of last layers that are neither merged nor dropped.
    """

    m: int = 2
    remerges: bool = False
    drops: bool = False
    protect_first: int = 0
    protect_last: int = 0
    variable_size: bool = False
    kinds: tuple[Hashable, ...] = ()
    needed: tuple[bool, ...] = ()
    needs_last: bool = False

    @property
    def protected(self) -> int:
        """Number of protected layers."""
        return self.protect_first + self.protect_last

    def smallest_depth(self, num_layers: int) -> int:
        """The smallest depth that can be reached."""
        if self.drops:
            return max(1, self.protected)
        if not self.kinds:
            return smallest_depth(num_layers, self.m, self.remerges, self.protected)
        runs = self._runs_of_a_kind(num_layers)
        if self.remerges:
            return self.protected + len(runs)
        if self.variable_size:
            return num_layers - sum(run - -(-run // self.m) for run in runs)
        full = sum(run // self.m for run in runs)
        rest = max(run % self.m for run in runs)
        return num_layers - full * (self.m - 1) - max(0, rest - 1)

    def _runs_of_a_kind(self, num_layers: int) -> list[int]:
        """Lengths of the runs of unprotected layers of one kind."""
        free = self.kinds[self.protect_first : num_layers - self.protect_last]
        return [len(list(run)) for _, run in groupby(free)]

    def alike(self, history: Sequence[Span], first: int, last: int) -> bool:
        """Whether layers first..last of the current model are of one kind."""
        kinds = {self.kinds[span[0]] for span in history[first : last + 1]} if self.kinds else ()
        return len(kinds) <= 1

    def spans(
        self, history: Sequence[Span], target: int, stop: int | None = None
    ) -> list[tuple[int, int]]:
        """Spans (first, last) that may be merged, or dropped, such that `target` stays reachable.

        Args:
            history: original layers merged into each layer of the current model.
            target: the depth to reach, below the current depth.
            stop: with `variable_size`, an intermediate depth that must not be skipped.

        Raises:
            ValueError: no layers can be dropped without the last layer of the needed kind.
        """
        depth = len(history)
        size = span_size(depth, target if stop is None else stop, self.m)
        assert size >= 2
        sizes = range(2, size + 1) if self.variable_size else [size]
        begin, end = self.protect_first, depth - self.protect_last
        if self.drops:
            drops = [(first, first + size - 2) for first in range(begin, end - size + 2)]
            removed = self.allowed_drops([range(a, b + 1) for a, b in drops], depth)
            return [(layers[0], layers[-1]) for layers in removed]
        spans = [(first, first + n - 1) for n in sizes for first in range(begin, end - n + 1)]
        spans = [span for span in spans if self.alike(history, *span)]
        if self.remerges:
            return spans
        closed = [len(h) > 1 or not begin <= i < end for i, h in enumerate(history)]
        eligible = []
        for first, last in spans:
            if any(closed[first : last + 1]):
                continue
            after = [*closed[:first], True, *closed[last + 1 :]]
            rest = [*history[: first + 1], *history[last + 1 :]]
            cuts = [not self.alike(rest, i - 1, i) for i in range(1, len(rest))]
            runs, excess = _runs(after, cuts), depth - (last - first) - target
            if self.variable_size:
                reachable = sum(run - -(-run // self.m) for run in runs) >= excess
            else:
                reachable = _reachable(runs, excess, self.m)
            if reachable:
                eligible.append((first, last))
        return eligible

    def allowed_drops(self, drops: Sequence[Drop], depth: int) -> list[Drop]:
        """The sets of layers whose removal leaves a layer of the needed kind.

        Args:
            drops: layers of the current model, ascending in each set.
            depth: number of layers of the current model.

        Raises:
            ValueError: none of the sets may be removed.
        """
        allowed = [layers for layers in drops if self._leaves_needed(layers)]
        if drops and not allowed:
            why = "none with attention, in which a cache counts its tokens"
            if self.needs_last:
                why = "a last one of a kind that transformers cannot load as the last"
            raise ValueError(
                f"dropping {len(drops[0])} of {depth} layers here would leave {why}; protect fewer "
                "layers, or drop fewer"
            )
        return allowed

    def _leaves_needed(self, removed: Sequence[int]) -> bool:
        """Whether a layer of the needed kind is left if these layers are dropped."""
        left = [need for layer, need in enumerate(self.needed) if layer not in removed]
        return not self.needed or (left[-1] if self.needs_last else any(left))

    def removal(self, first: int, last: int) -> tuple[int, int, int | None]:
        """First and last layer to merge for a scored span, and the index of a drop's kept layer.

        A drop keeps the layer before the scored span, or the layer after it if there is none. The
        index counts from the first returned layer; it is None for a merge.
        """
        if not self.drops:
            return first, last, None
        if first > 0:
            return first - 1, last, 0
        return first, last + 1, last + 1 - first


def _runs(merged: Sequence[bool], cuts: Sequence[bool]) -> list[int]:
    """Lengths of the runs of two or more layers that can still be merged.

    `cuts`: whether each layer but the first is of another kind than the one before it.
    """
    runs, length = [], 0
    for flag, cut in zip([*merged, True], [False, *cuts, False], strict=True):
        if flag or cut:
            runs.append(length)
            length = 0
        length += not flag
    return [run for run in runs if run >= 2]


def _reachable(runs: Sequence[int], excess: int, m: int) -> bool:
    """Whether spans of m layers, and one smaller span, can remove `excess` more layers."""
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
    """The depth after each merge on the way to `target`."""
    result = []
    depth = num_layers
    while depth > target:
        depth -= span_size(depth, target, m) - 1
        result.append(depth)
    return result


def check_target(
    num_layers: int,
    target: int,
    rules: SpanConstraints,
    save_at: Iterable[int] = (),
    nested: bool = True,
) -> None:
    """Checks that a target depth fits the model and can be reached.

    Args:
        num_layers: layers of the dense model.
        target: the depth to reach.
        rules: which spans are allowed.
        save_at: other depths to save.
        nested: whether those depths must be reached on the way to the target.

    Raises:
        ValueError: m or the target does not fit the model, the target cannot be reached without
            remerging, or a depth of `save_at` is not reached on the way.
    """
    if not 1 <= target < num_layers:
        raise ValueError(
            f"merge.target_layers={target}: the model has {num_layers} layers, so a target is "
            f"from 1 to {num_layers - 1}"
        )
    if not 2 <= rules.m <= num_layers:
        raise ValueError(
            f"merge.m={rules.m}: a span has at least 2 layers and at most the model's {num_layers}"
        )
    protects = (
        f"merge.protect_first={rules.protect_first} and merge.protect_last={rules.protect_last}"
    )
    if rules.protected >= num_layers:
        raise ValueError(f"{protects} leave none of the model's {num_layers} layers to merge")
    least = rules.smallest_depth(num_layers)
    if target < least and rules.kinds:
        raise ValueError(
            f"{target} of {num_layers} layers cannot be reached with merge.m={rules.m}, because "
            f"only layers of one kind are merged; the smallest depth that can is {least}. "
            "merge.kinds=first also merges layers that differ in their kind but not in their "
            "tensors, such as windows"
        )
    if target < least:
        keeps = f" with {protects}" if rules.protected else ""
        message = (
            f"{target} of {num_layers} layers cannot be reached with merge.m={rules.m}{keeps} "
            f"unless a merged layer is merged again; the smallest depth that can is {least}. Ask "
            f"for at least {least} layers, or set merge.allow_remerge=true (with "
            "merge.schedule=mixed merge.selection=angular in place of optimal_partition)"
        )
        if target < replace(rules, remerges=True).smallest_depth(num_layers):
            message = (
                f"{target} of {num_layers} layers cannot be reached{keeps}; the smallest depth "
                f"that can is {least}"
            )
        raise ValueError(message)
    stops = sorted({target, *(depth for depth in save_at if depth > target)}, reverse=True)
    if (
        rules.variable_size
        and not rules.remerges
        and _layers_used(num_layers, stops, rules.m) > (num_layers - rules.protected)
    ):
        raise ValueError(
            f"merge.save_at={list(save_at)} asks for more spans on the way to {target} layers "
            f"than {num_layers - rules.protected} layers can make; leave depths out"
        )
    passed = depths(num_layers, target, rules.m)
    for depth in save_at:
        if nested and not rules.variable_size and depth not in passed:
            raise ValueError(
                f"merge.save_at has {depth}, which is not a depth on the way to {target} layers "
                f"with merge.m={rules.m}: {', '.join(map(str, passed))}"
            )
        if not target <= depth < num_layers:
            raise ValueError(
                f"merge.save_at has {depth}, which does not lie between the target {target} and "
                f"the model's {num_layers} layers"
            )


def _layers_used(num_layers: int, stops: Sequence[int], m: int) -> int:
    """Layers in the fewest spans of at most `m` layers that reach all depths, in order."""
    spans, depth = 0, num_layers
    for stop in stops:
        spans += -(-(depth - stop) // (m - 1))
        depth = stop
    return num_layers - stops[-1] + spans


def layers_for_sparsity(sparsity: float, layers: int, total: int, per_layer: int) -> int:
    """The depth at which the removed layers come closest to a share of all parameters.

    Args:
        sparsity: share of the model's parameters to remove, in (0, 1).
        layers: decoder layers of the model.
        total: parameters of the model; tied parameters count once.
        per_layer: parameters of one decoder layer.

    Returns:
        The target depth.

    Raises:
        ValueError: the share rounds to no layer, or to all layers.
    """
    removed = round(sparsity * total / per_layer)
    if removed < 1:
        raise ValueError(
            f"merge.sparsity={sparsity} is less than half a layer; one layer of this model is "
            f"{per_layer / total:.4f} of its parameters"
        )
    if removed >= layers:
        raise ValueError(
            f"merge.sparsity={sparsity} is more than merging can reach: with one layer left, "
            f"{(layers - 1) * per_layer / total:.4f} of the parameters are removed"
        )
    return layers - removed


def check_groups_kinds(groups: Sequence[Sequence[int]], kinds: Sequence[Hashable]) -> None:
    """Raises ValueError if a group of `merge.groups` has layers that cannot be merged."""
    for group in groups:
        if kinds and len({kinds[layer] for layer in group}) > 1:
            raise ValueError(
                f"merge.groups has {list(group)}, layers of several kinds; merge.kinds=first or "
                "last merges those that differ in their kind but not in their tensors"
            )
