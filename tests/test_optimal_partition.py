"""Optimal partitions into spans from pairwise costs, and the costs of trial merges."""

import copy
import itertools
import json
import math
import random

import pytest
import torch

from come.merge.loop import compress
from come.merge.plan import MergeStep, SpanCandidate
from come.merge.schedules.optimal_partition import (
    OptimalPartition,
    estimate,
    known_costs,
    optimal_partition,
)
from come.merge.selection import trial_kl
from come.merge.selection.trial_kl import repeat_windows
from come.merge.trial_scores import TrialScores
from come.models import loss
from come.models.head import Head
from come.models.loss import predictions, token_divergence
from tests.conftest import pico
from tests.methods import come_plus, decoder_layers, paper, without
from tests.reference import Reference

METHOD = {"schedule": "optimal_partition", "selection": "trial_kl", "refit": "ridge", "m": 3}


def all_partitions(depth, m):
    """All sets of disjoint spans of 2 to m layers."""
    if depth == 0:
        return [[]]
    found = list(all_partitions(depth - 1, m))
    for size in range(2, min(m, depth) + 1):
        group = (depth - size, depth - 1)
        found += [[*groups, group] for groups in all_partitions(depth - size, m)]
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("m", "saved"), [(2, [2]), (3, [3, 1]), (4, [4]), (4, [2, 3]), (3, [1, 2, 1])]
)
def test_optimal_partition_equals_brute_force(seed, m, saved):
    draw, depth = random.Random(seed), 8
    costs = {(i, i + 1): draw.random() for i in range(depth - 1) if draw.random() < 0.9}

    best = brute_force(estimate(costs), depth, m, saved)
    assert optimal_partition(estimate(costs), depth, m, saved) == best


def brute_force(cost, depth, m, saved):
    """The cheapest partition among all sets of spans and all assignments of spans to stops."""
    best = None
    for groups in all_partitions(depth, m):
        if any(cost(*group) is None for group in groups):
            continue
        for places in itertools.product(range(len(saved)), repeat=len(groups)):
            parts = [
                sorted(g for g, place in zip(groups, places, strict=True) if place == part)
                for part in range(len(saved))
            ]
            if [sum(b - a for a, b in part) for part in parts] != saved:
                continue
            kept = [part for end in range(len(saved)) for part in parts[: end + 1]]
            total = sum(cost(*group) for part in kept for group in part)
            if best is None or total < best[0]:
                best = total, parts
    return best and best[1]


def test_costs_of_untried_spans_are_estimated():
    pairs = {(0, 1): 1.0, (1, 2): 2.0, (2, 3): 3.0, (4, 5): 1.0}
    cost = estimate(pairs)
    assert (cost(0, 1), cost(0, 2), cost(0, 3), cost(3, 4), cost(3, 5)) == (1, 3, 6, None, None)
    cost = estimate({**pairs, (0, 2): 6.0})  # twice the sum of its pairs
    assert (cost(0, 1), cost(0, 2), cost(1, 3), cost(0, 3)) == (1, 6, 10, 12)


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize(("batch_size", "repeat_weight"), [(1, 0.5), (3, 0.5), (3, 0.1), (3, 0.0)])
@torch.no_grad()
def test_trial_cost_is_the_kl_divergence_of_the_predictions(
    family, batch_size, repeat_weight, windows, monkeypatch
):
    """KL of complete models in which the fitted layer replaces the span, on the validation windows.

    With a repeat weight, the windows repeat their first half.
    """
    fit, fitted = trial_kl.fitted_trial, {}

    def recorded(group, *rest):
        assert group.stream.windows.tolist() == windows[:2].tolist()
        route = fit(group, *rest)
        fitted[group.first, group.last] = copy.deepcopy(route[0][1])
        return route

    monkeypatch.setattr(trial_kl, "fitted_trial", recorded)
    recipe = paper(
        **METHOD,
        retention="adaptive",
        options={
            "shortlist": 2,
            "trial_windows": 2,
            "validation_windows": 2,
            "repeat_weight": repeat_weight,
        },
    )
    plan = compress(
        pico(family), windows, recipe, target_layers=5, batch_size=batch_size, progress=False
    )
    dense = pico(family)
    ids = torch.cat([windows[-2:, :8], windows[-2:, 1:8]], dim=1)
    assert torch.equal(repeat_windows(windows[-2:]), ids)
    if not repeat_weight:
        ids = windows[-2:]
    reference = dense.double()(ids).logits.log_softmax(-1)
    assert len(plan.steps[0].candidates) == 2
    for c in plan.steps[0].candidates:
        merged = without(pico(family), {c.last})
        layers = decoder_layers(merged)
        layers[c.first] = fitted[c.first, c.last]
        predicted = merged.double()(ids).logits.log_softmax(-1)
        kl = (reference.exp() * (reference - predicted)).sum(-1)
        expected = (1 - repeat_weight) * kl[:, :8].mean() + repeat_weight * kl[:, 8:].mean()
        if not repeat_weight:
            expected = kl.mean()
        assert c.score == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("tokens", [2, 3])
def test_windows_too_short_to_repeat(tokens, windows):
    options = {"shortlist": 2, "repeat_weight": 0.2}
    recipe = paper(**METHOD, retention="adaptive", options=options)
    plan = compress(pico("llama_gqa"), windows[:, :tokens], recipe, target_layers=5, progress=False)
    assert min(c.score for c in plan.steps[0].candidates) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_average_the_rows_of_the_head_in_float32(dtype):
    """Also if the head has half precision; 3000 entries are not a multiple of a part."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 3000, bias=False).to(dtype)
    states = torch.randn(2, 5, 16, generator=generator).to(dtype)
    with torch.no_grad():
        shares = head(states).double().softmax(-1)
        expected = shares @ head.weight.double()
    found = predictions(head, states).rows
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_token_divergence_over_vocabulary_chunks(bias, monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY", 128)  # chunks of 128, 128 and 44
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 300, bias=bias)
    reference, states = torch.randn(2, 3, 150, 6, generator=generator)
    with torch.no_grad():
        logs = [head(end).double().log_softmax(-1) for end in (reference, states)]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)
    found = token_divergence(head, predictions(head, reference), states)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    same = token_divergence(head, predictions(head, reference), reference)
    torch.testing.assert_close(same, torch.zeros(3, 150).double(), rtol=0, atol=1e-4)


def test_token_divergence_of_capped_logits():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.nn.Linear(6, 300), None, scale=2.0, cap=1.5)
    reference, states = torch.randn(2, 3, 150, 6, generator=generator)
    with torch.no_grad():
        logits = [
            1.5 * torch.tanh(2 * head.linear(end).double() / 1.5) for end in (reference, states)
        ]
    logs = [end.log_softmax(-1) for end in logits]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1)
    found = token_divergence(head, predictions(head, reference), states)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["angular", "trial_kl"])
def test_all_stops_are_reached_with_costs_measured_once(selection, windows):
    """A resumed process uses the costs of the dense model in the plan."""
    plans = []
    method = paper(**METHOD | {"selection": selection})
    compress(
        pico("llama_gqa"), windows, method, target_layers=2, stops=[4], progress=False,
        on_step=plans.append,
    )  # fmt: skip
    assert plans[-1].num_layers == 2
    assert 4 in [plan.num_layers for plan in plans]
    first, *others = plans[-1].steps
    costs = {(c.first, c.last): c.score for c in first.candidates}
    assert set(itertools.pairwise(range(6))) <= set(costs)
    merged = [[layer for span in step.spans for layer in span] for step in plans[-1].steps]
    merged = [(layers[0], layers[-1]) for layers in merged]
    best = brute_force(estimate(costs), 6, 3, [2, 2])
    assert merged == [*best[0], *best[1]]
    for step, group in zip(plans[-1].steps, merged, strict=True):
        assert step.score == pytest.approx(estimate(costs)(*group))
        assert group in costs or selection == "angular"
    assert all(len(step.candidates) == 1 for step in others)
    again = compress(
        pico("llama_gqa"), windows, method, target_layers=2, stops=[4], progress=False,
        plan=plans[0],
    )  # fmt: skip
    assert [(s.first, s.last) for s in again.steps] == [(s.first, s.last) for s in plans[-1].steps]


def test_untried_pairs_are_tried_when_needed(windows):
    """One pair suffices to remove one layer; a smaller target tries more pairs."""
    method = paper(**METHOD | {"m": 2}, options={"shortlist": 1})
    plan = compress(pico("llama_gqa"), windows, method, target_layers=5, progress=False)
    assert len(plan.steps[0].candidates) == 2  # twice the number of layers to remove
    model = pico("llama_gqa")
    deeper = compress(model, windows, method, target_layers=3, plan=plan, progress=False)
    assert deeper.num_layers == 3
    assert [len(span) for span in deeper.history] == [2, 2, 2]


def test_all_stops_are_planned_from_the_start():
    """12 layers to 10, 8, 5 and 4: large early spans could make later stops unreachable."""
    for seed in range(40):
        draw = random.Random(seed)
        costs = {(i, i + 1): draw.random() for i in range(11)}
        saved, depth = [2, 2, 3, 1], 12
        found = optimal_partition(estimate(costs), depth, 4, saved)
        assert [sum(b - a for a, b in part) for part in found] == saved


def test_costs_of_another_recipe_are_not_reused(windows):
    """A plan that started with angles continues with new trials."""
    angular = paper(**METHOD | {"selection": "angular"})
    plan = compress(pico("llama_gqa"), windows, angular, target_layers=5, progress=False)
    method = paper(**METHOD)
    assert not method.equals(plan.provenance["recipe"])
    assert angular.equals(plan.provenance["recipe"])
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, plan=plan, progress=False)
    assert len(plan.steps[1].candidates) > 1


def test_protected_layers_are_not_tried(windows):
    method = paper(**METHOD | {"selection": "angular"}, protect_first=2, protect_last=2)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=5, progress=False)
    assert [(c.first, c.last) for c in plan.steps[0].candidates] == [(2, 3)]


def test_unreachable_depths(windows):
    middle = paper(groups=((2, 3),))
    plan = compress(pico("llama_gqa"), windows, middle, target_layers=5, progress=False)
    method = paper(**METHOD | {"m": 4})
    with pytest.raises(ValueError, match="no spans are left that lead to 2"):
        compress(pico("llama_gqa"), windows, method, target_layers=2, plan=plan, progress=False)


def test_too_many_stops():
    OptimalPartition.check_depths(32, range(16, 32))
    with pytest.raises(ValueError, match="merge.save_at has too many: 79, 78, .*schedule=mixed"):
        OptimalPartition.check_depths(80, range(50, 80))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"allow_remerge": True},
            "schedule=optimal_partition .*dense model.*merge.allow_remerge=true",
        ),
        ({"operator": "drop", "refit": "none"}, "choose merge.schedule=progressive"),
        ({"options": {"shortlist": 0}}, "merge.selection.shortlist=0: must be"),
        (
            {"options": {"validation_windows": 0}},
            "merge.selection.validation_windows=0: must be",
        ),
        ({"options": {"shortlist": "ten"}}, "shortlist='ten': must be a whole number"),
        (
            {"options": {"validation_windows": 2.5}},
            "validation_windows=2.5: must be a whole number",
        ),
        (
            {"options": {"validation_windows": True}},
            "validation_windows=True: must be a whole number",
        ),
        (
            {"options": {"repeat_weight": "half"}},
            "merge.selection.repeat_weight='half': must be a n",
        ),
        (
            {"options": {"repeat_weight": 2.0}},
            r"repeat_weight=2.0: must be .* of at most 1",
        ),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(**METHOD | settings)


def test_interrupted_search_reuses_its_trials(windows, tmp_path, monkeypatch):
    class Interrupt(Exception):
        pass

    fit, tried = trial_kl.fitted_trial, []

    def counted(group, *rest):
        if len(tried) == 3 and not (tmp_path / "again").exists():
            raise Interrupt
        tried.append((group.first, group.last))
        return fit(group, *rest)

    monkeypatch.setattr(trial_kl, "fitted_trial", counted)
    path, method = tmp_path / "trials.json", come_plus(m=2)
    method.schedule.candidate_sets = 1  # layers of trials are fitted again

    def run(job="a"):
        scores = TrialScores(path, job)
        return compress(
            pico("llama_gqa"), windows, method, target_layers=4, trials=scores, progress=False
        )

    with pytest.raises(Interrupt):
        run()
    assert len(json.loads(path.read_text())["scores"]) == 3
    (tmp_path / "again").touch()
    resumed = run()
    assert len(tried) == len(set(tried))  # no trial is repeated
    once = len(tried)
    assert run("b").hash == resumed.hash  # scores of another job are ignored
    assert len(tried) == 2 * once


def test_pairs_with_the_smallest_angles_are_tried_once(windows):
    """The shortlist of pairs, and no second trial after a merge or in a continued compression."""

    def model():
        return pico("llama_gqa", num_hidden_layers=10)

    def angle(first):
        cosines = reference.cosines(first, first + 2, "last")
        return sum(math.acos(min(max(c, -1), 1)) for c in cosines)

    method, reference = (
        paper(**METHOD | {"m": 2}, options={"shortlist": 1}),
        Reference(model(), windows),
    )
    smallest = sorted(sorted(range(9), key=angle)[:4])
    assert smallest != [0, 1, 2, 3]
    plan = compress(model(), windows, method, target_layers=8, progress=False)
    assert sorted(c.first for c in plan.steps[0].candidates) == smallest
    assert len(plan.steps[1].candidates) == 1
    begun = compress(model(), windows, method, target_layers=9, progress=False)
    more = compress(model(), windows, method, target_layers=8, plan=begun, progress=False)
    assert [len(step.candidates) for step in more.steps] == [2, 2]


def test_known_costs_are_of_spans_of_unmerged_layers():
    """A candidate next to a merged layer counts, one with a merged layer in it does not."""
    first = [SpanCandidate(2, 3, 0.1), SpanCandidate(3, 4, 0.2)]
    second = [SpanCandidate(1, 2, 0.3), SpanCandidate(2, 3, 0.4), SpanCandidate(4, 5, 0.5)]
    steps = [
        MergeStep(3, 4, [[3], [4]], [0.5, 0.5], {}, 0.2, first, []),
        MergeStep(4, 5, [[5], [6]], [0.5, 0.5], {}, 0.5, second, []),
    ]
    assert known_costs(steps, 7) == {(2, 3): 0.1, (3, 4): 0.2, (1, 2): 0.3, (5, 6): 0.5}
