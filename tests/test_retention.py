"""Retention rules against plain float64 computations."""

import copy
import itertools
import math

import pytest
import torch

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.retention.posterior import _moves
from come.statistics.layer_statistics import StatisticsCollector
from come.statistics.manifold import diffusion_map, shared_information
from tests.conftest import LAYERS, pico
from tests.methods import (
    come_scores,
    loss,
    paper,
    plain_units,
)
from tests.reference import UNITS, Reference


@pytest.mark.parametrize("m", [2, 3])
def test_posterior_minimises_the_loss(windows, m):
    groups = (tuple(range(2, 2 + m)),)
    method = paper(groups=groups, retention="posterior", options={"granularity": 4})
    model = pico("llama_gqa")
    plan = compress(model, windows, method, target_layers=LAYERS - m + 1, progress=False)
    losses = {}
    for counts in itertools.product(range(5), repeat=m):
        if sum(counts) != 4:
            continue
        step = plan.steps[0]
        scores = come_scores(windows, groups[0])
        kept = plain_units(scores, [c / 4 for c in counts])
        tried = copy.deepcopy(plan)
        object.__setattr__(tried.steps[0], "kept", kept)
        object.__setattr__(tried.steps[0], "shares", [c / 4 for c in counts])
        with torch.no_grad():
            losses[counts] = float(loss(apply(tried, pico("llama_gqa")).double(), windows))
    best = tuple(round(4 * share) for share in step.shares)
    if m == 2:
        assert losses[best] == pytest.approx(min(losses.values()), rel=1e-5)
    else:  # a local minimum
        near = [c for c in losses if sum(abs(a - b) for a, b in zip(c, best)) == 2]
        assert losses[best] <= min(losses[c] for c in near) * (1 + 1e-5)


def test_joint_ranks_all_units_of_the_span(windows):
    method = paper(groups=((1, 2, 3),), retention="joint")
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    scores = come_scores(windows, (1, 2, 3))
    for unit in UNITS:
        total = len(scores[unit][0])
        ranked = sorted(
            (-score / sum(layer), index, j)
            for index, layer in enumerate(scores[unit])
            for j, score in enumerate(layer)
        )[:total]
        expected = [sorted(j for _, i, j in ranked if i == index) for index in range(3)]
        assert plan.steps[0].kept[unit] == expected
    assert plan.steps[0].shares == [len(k) / 24 for k in plan.steps[0].kept["channel"]]


def test_mka_weights_are_a_sigmoid_of_mean_similarity(windows):
    windows = 3 + (windows.repeat(4, 1) + 11 * torch.arange(20)[:, None]) % 290
    method = paper(operator="average", retention="mka", groups=((2, 3),))
    model = pico("llama_gqa")
    maps = [diffusion_map(h[:, -1]) for h in Reference(model, windows).h[1:]]
    plan = compress(model, windows, method, target_layers=5, progress=False)
    means = [sum(shared_information(maps[i], other) for other in maps) / 6 for i in (2, 3)]
    expected = 1 / (1 + math.exp(-means[0] / sum(means)))
    assert plan.steps[0].shares == pytest.approx([expected, 1 - expected], rel=0.05)


def test_moments_are_collected_only_if_needed(windows, monkeypatch):
    requested = []

    class Recorder(StatisticsCollector):
        def __init__(self, adapter, kinds, *rest):
            requested.append(tuple(kinds))
            super().__init__(adapter, kinds, *rest)

    monkeypatch.setattr("come.merge.search.StatisticsCollector", Recorder)
    for method in (paper(), paper(retention="leverage", norms="fold"), paper(operator="average")):
        compress(pico("llama_gqa"), windows, method, target_layers=LAYERS - 1, progress=False)
    assert requested == [tuple(paper().sensitivity.moments), (), ()]
    assert requested[0]


@pytest.mark.parametrize("rule", ["adaptive", "leverage"])
def test_rules_that_do_not_use_sensitivities(rule):
    with pytest.raises(ValueError, match=f"no effect with merge.retention={rule}"):
        paper(retention=rule, sensitivity="wanda")


def test_moves_of_a_share():
    assert list(_moves((2, 0))) == [(1, 1)]
    assert list(_moves((1, 1))) == [(0, 2), (2, 0)]
