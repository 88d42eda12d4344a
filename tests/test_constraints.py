"""Constraints on spans: eligible spans, and reachable depths."""

from functools import cache
from itertools import combinations_with_replacement

import pytest

from come.merge.constraints import (
    SpanConstraints,
    _reachable,
    check_target,
    depths,
    layers_for_sparsity,
    smallest_depth,
    span_size,
)
from come.merge.loop import compress
from come.merge.schedules.base import SCHEDULES
from tests.conftest import LAYERS, pico
from tests.methods import paper


@cache
def reachable(runs: tuple[int, ...], excess: int, m: int) -> bool:
    """Brute force: whether merges of m, the last one smaller, remove exactly `excess` layers."""
    if excess == 0:
        return True
    size = min(m, excess + 1)
    return any(
        reachable((*runs[:i], at, run - size - at, *runs[i + 1 :]), excess - size + 1, m)
        for i, run in enumerate(runs)
        for at in range(run - size + 1)
    )


@pytest.mark.parametrize("layers", range(2, 11))
@pytest.mark.parametrize("m", [2, 3, 4])
def test_smallest_depth_equals_brute_force(layers, m):
    if m <= layers:
        least = min(t for t in range(1, layers + 1) if reachable((layers,), layers - t, m))
        assert smallest_depth(layers, m, False) == least
    assert smallest_depth(layers, m, True) == 1


@pytest.mark.parametrize("m", [3, 4])
def test_runs_that_can_lose_layers_equal_brute_force(m):
    """Also if the last, smaller span fits into only one of the runs."""
    for count in (1, 2, 3):
        for runs in combinations_with_replacement(range(2, 8), count):
            for excess in range(1, sum(runs)):
                assert _reachable(runs, excess, m) == reachable(runs, excess, m), (runs, excess)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("merged", [(), (3,), (2, 5), (1, 4, 7)])
def test_eligible_spans_keep_the_target_reachable(m, merged):
    depth = 10
    history = [[i, -i] if i in merged else [i] for i in range(depth)]
    for target in range(4, depth):
        size = span_size(depth, target, m)
        expected = []
        for first in range(depth - size + 1):
            group = range(first, first + size)
            blocked = {*merged, *group}
            runs, run = [], 0
            for i in range(depth + 1):
                if i == depth or i in blocked:
                    runs.append(run)
                    run = 0
                else:
                    run += 1
            fits = reachable(tuple(runs), depth - size + 1 - target, m)
            if fits and not set(merged) & set(group):
                expected.append((first, first + size - 1))
        assert SpanConstraints(m).spans(history, target) == expected


def test_remerging_makes_every_span_eligible():
    history = [[0, 1], [2], [3]]
    assert SpanConstraints(2, remerges=True).spans(history, 1) == [(0, 1), (1, 2)]
    assert SpanConstraints(3, remerges=True).spans(history, 1) == [(0, 2)]


def test_protected_layers_are_in_no_span():
    history = [[i] for i in range(8)]
    merges = SpanConstraints(2, protect_first=2, protect_last=1)
    assert merges.spans(history, 6) == [(2, 3), (3, 4), (4, 5), (5, 6)]
    assert merges.spans(history, 7)[0] == (2, 3)
    assert merges.smallest_depth(8) == 8 - 2
    drops = SpanConstraints(3, remerges=True, drops=True, protect_first=2, protect_last=1)
    assert drops.spans(history, 4) == [(2, 3), (3, 4), (4, 5), (5, 6)]
    assert drops.smallest_depth(8) == 3


def test_drop_keeps_the_layer_before_or_otherwise_after():
    drops = SpanConstraints(3, remerges=True, drops=True)
    assert drops.removal(2, 3) == (1, 3, 0)
    assert drops.removal(0, 1) == (0, 2, 2)
    assert SpanConstraints(3).removal(2, 4) == (2, 4, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 14, SpanConstraints(2)), "smallest depth that can is 15"),
        ((30, 9, SpanConstraints(3)), r"smallest depth that can is 10.*merge.allow_remerge=true"),
        ((30, 30, SpanConstraints(2)), "merge.target_layers=30: the model has 30 layers"),
        (
            (4, 2, SpanConstraints(5)),
            "merge.m=5: a span .* and at most the model's 4",
        ),
        ((30, 25, SpanConstraints(3), [26, 27]), "merge.save_at has 27, .* merge.m=3: 28, 26, 25"),
        (
            (30, 3, SpanConstraints(2, True, True, 4, 2)),
            "30 layers cannot .* with merge.protect_first=4 .* is 6",
        ),
        ((30, 20, SpanConstraints(11), [19], False), "save_at has 19, which does not lie between"),
    ],
)
def test_invalid_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_target(*arguments)


def test_depths():
    assert depths(10, 5, 3) == [8, 6, 5]


def test_sparsity_takes_the_nearest_depth():
    assert layers_for_sparsity(0.1, 30, 134_515_008, 3_540_096) == 26
    with pytest.raises(ValueError, match="less than half a layer; one layer .* is 0.0263"):
        layers_for_sparsity(0.01, 30, 134_515_008, 3_540_096)
    with pytest.raises(
        ValueError, match="with one layer left, 0.7632 of the parameters are removed"
    ):
        layers_for_sparsity(0.9, 30, 134_515_008, 3_540_096)


def completes(layers, target, m):
    """Brute force: whether spans of 2 to m adjacent unmerged layers can reach a depth."""
    if len(layers) == target:
        return True
    spans = [(i, i + n) for n in range(2, m + 1) for i in range(len(layers) - n + 1)]
    return any(
        completes([*layers[:i], False, *layers[j:]], target, m)
        for i, j in spans
        if all(layers[i:j]) and len(layers) - (j - i) + 1 >= target
    )


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("merged", [(), (2,), (0, 4)])
def test_eligible_variable_size_spans_keep_the_target_reachable(m, merged):
    history = [[i, 9] if i in merged else [i] for i in range(7)]
    layers, rules = [i not in merged for i in range(7)], SpanConstraints(m, variable_size=True)
    for target in range(2, 7):
        for stop in range(target, 7):
            expected = [
                (i, i + n - 1)
                for n in range(2, min(m, 7 - stop + 1) + 1)
                for i in range(7 - n + 1)
                if all(layers[i : i + n])
                and completes([*layers[:i], False, *layers[i + n :]], target, m)
            ]
            assert rules.spans(history, target, stop) == expected


def test_targets_of_variable_size_spans():
    rules = SpanConstraints(4, variable_size=True)
    check_target(30, 21, rules, [27, 26, 23])
    with pytest.raises(ValueError, match="smallest depth that can is 8"):
        check_target(30, 7, rules)


def test_stops_that_make_the_target_unreachable():
    rules = SpanConstraints(4, variable_size=True)
    check_target(30, 8, rules, [29])
    check_target(30, 8, rules, [27])
    with pytest.raises(ValueError, match=r"merge.save_at=\[29, 28\] asks for more spans"):
        check_target(30, 8, rules, [29, 28])


def test_protected_layers_do_not_count_as_reachable():
    history = [[i] for i in range(6)]
    assert SpanConstraints(2, protect_last=2).spans(history, 4) == [(0, 1), (2, 3)]
    assert SpanConstraints(2, protect_first=2).spans(history, 4) == [(2, 3), (4, 5)]


def test_bounds_of_targets():
    rules = SpanConstraints(4, variable_size=True, protect_first=3)
    with pytest.raises(ValueError, match="asks for more spans"):
        check_target(8, 5, rules, [7, 6])
    size = (30, 134_515_008, 3_540_096)
    assert [layers_for_sparsity(share, *size) for share in (0.02, 0.77)] == [29, 1]
    with pytest.raises(ValueError, match="more than merging can reach"):
        layers_for_sparsity(0.78, *size)
    assert SpanConstraints(2, remerges=True, drops=True).smallest_depth(6) == 1


def test_what_remerging_can_reach():
    """It is advised down to the smallest depth that it reaches, and not below."""
    rules = SpanConstraints(2, protect_first=3)
    with pytest.raises(ValueError, match=r"smallest depth that can is 6.*merge.allow_remerge=true"):
        check_target(8, 4, rules)
    with pytest.raises(ValueError, match=r"cannot be reached with merge.protect_first=3.* is 6$"):
        check_target(8, 3, rules)


def test_schedules_that_search_every_depth_from_the_dense_model():
    nested = {name: SCHEDULES.get(name).nested for name in SCHEDULES.names()}
    assert [name for name, value in nested.items() if not value] == [
        *("block", "laco", "pairwise", "subfit", "swap")
    ]


def test_laco_merges_spans_of_m_layers_after_protected_ones(windows):
    method = paper(schedule="laco", operator="laco", allow_remerge=True, m=2, protect_first=1)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=LAYERS - 2, progress=False)
    assert [step.last - step.first for step in plan.steps] == [1, 1]
    assert plan.history[0] == [0]
