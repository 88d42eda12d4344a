"""Schedules that choose a set of layers to drop: LoRP, pairs of removals, and swaps."""

from itertools import combinations

import pytest
import torch

from come.job.estimate import compression_cost
from come.linalg.subsets import (
    best_consistent_subset,
    best_subset,
    consistent_cost,
    cost,
    enumerated,
    swapped,
)
from come.merge.loop import compress
from come.merge.schedules.lorp import allocate, clusters, locality, num_clusters, similarity
from come.merge.schedules.pairwise import losses_without_pairs
from come.merge.selection.skip_loss import losses_without
from come.merge.trial_scores import TrialScores
from come.models.loading import inspect_model
from come.schema.explicit import check_explicit
from come.statistics.influence import chosen_tokens
from tests.conftest import LAYERS, pico
from tests.jobs import settings
from tests.methods import decoder_layers, dropped_layers, loss, paper, recipe, without
from tests.reference import Reference


def blocks(*sizes, inside=0.9, across=0.2):
    """Similarities of layers in blocks, a little larger for deeper pairs."""
    depth = sum(sizes)
    block = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    similar = torch.where(block[:, None] == block, inside, across).double()
    similar += 1e-3 * (torch.arange(depth)[:, None] + torch.arange(depth))
    return similar.fill_diagonal_(1.0)


def quadratic(items, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(items, generator=generator, dtype=torch.float64)
    pairs = torch.randn(items, items, generator=generator, dtype=torch.float64)
    return linear, (pairs + pairs.T).fill_diagonal_(0)


def plain_cost(linear, pairs, chosen):
    alone = sum(float(linear[i]) for i in chosen)
    return alone + sum(float(pairs[i, j]) for i, j in combinations(chosen, 2))


@pytest.mark.parametrize(("items", "size"), [(7, 1), (7, 3), (8, 5), (9, 9), (2, 1), (1, 1)])
def test_best_subset_is_that_of_all_subsets(items, size):
    linear, pairs = quadratic(items, seed=size)
    costs = {s: plain_cost(linear, pairs, s) for s in combinations(range(items), size)}
    best = min(costs, key=costs.get)
    found = best_subset(linear, pairs, size)
    assert found == list(best)
    assert cost(linear, pairs, found) == pytest.approx(costs[best])


def saturated(items, seed):
    """Costs of which some stop growing at 8, as losses without layers that a model needs."""
    generator = torch.Generator().manual_seed(seed)
    alone = torch.rand(items, generator=generator, dtype=torch.float64)
    alone[: items // 2] += 7
    noise = torch.rand(items, items, generator=generator, dtype=torch.float64)
    joint = (alone[:, None] + alone).clamp(max=8) + 0.15 * (noise + noise.T)
    return alone, (joint - (alone[:, None] + alone)).fill_diagonal_(0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("items", "size"), [(8, 1), (8, 2), (8, 4), (9, 6), (8, 8)])
def test_no_set_is_cheaper_than_its_worst_pair(items, size, seed):
    for linear, pairs in (saturated(items, seed), quadratic(items, seed)):

        def bounded(chosen, linear=linear, pairs=pairs):
            worst = [plain_cost(linear, pairs, pair) for pair in combinations(chosen, 2)]
            return max([plain_cost(linear, pairs, chosen), *worst])

        best = min(combinations(range(items), size), key=bounded)
        found = best_consistent_subset(linear, pairs, size)
        assert bounded(found) == pytest.approx(bounded(best))
        assert consistent_cost(linear, pairs, found) == pytest.approx(bounded(best))


def test_layers_that_a_model_needs_are_not_dropped_together():
    linear, pairs = saturated(10, 0)
    assert plain_cost(linear, pairs, best_subset(linear, pairs, 4)) < 0
    assert min(best_consistent_subset(linear, pairs, 4)) >= 5


def test_enumeration_in_parts(monkeypatch):
    linear, pairs = quadratic(10)
    whole = enumerated(linear, pairs, 4)
    monkeypatch.setattr("come.linalg.subsets._ROWS", 7)
    assert enumerated(linear, pairs, 4) == whole


def test_swaps_find_a_set_that_no_swap_improves(monkeypatch):
    hits = 0
    for seed in range(8):
        linear, pairs = quadratic(12, seed)
        found = swapped(linear, pairs, 4)
        least = plain_cost(linear, pairs, found)
        for out in found:
            for into in set(range(12)) - set(found):
                other = [i for i in found if i != out] + [into]
                assert plain_cost(linear, pairs, other) >= least - 1e-9
        hits += sorted(found) == sorted(enumerated(linear, pairs, 4))
    assert hits >= 7
    monkeypatch.setattr("come.linalg.subsets.LARGEST", 10)
    assert best_subset(linear, pairs, 4) == sorted(found)


def test_locality_score_and_clusters():
    similar = blocks(3, 3)
    mean = sum(float(similar[i, j]) for i, j in combinations(range(6), 2)) / 15
    assert 2 ** -locality(similar) == pytest.approx(mean)
    assert locality(-similar) == float("inf")
    assert [num_clusters(rls) for rls in (1.15, 1.0, 0.94, 0.7, 0.69)] == [2, 2, 3, 3, 4]
    assert clusters(similar, 2) == [[0, 1, 2], [3, 4, 5]]
    assert clusters(blocks(2, 3, 2), 3) == [[0, 1], [2, 3, 4], [5, 6]]
    assert clusters(similar, 1) == [[0, 1, 2, 3, 4, 5]]


def test_drops_spread_over_clusters():
    """One layer of each cluster, then those of the cluster that is still the most similar."""
    similar = blocks(4, 4)
    similar[:4, :4] *= 0.9
    similar.fill_diagonal_(1.0)
    members, free = [[0, 1, 2, 3], [4, 5, 6, 7]], range(1, 7)
    assert allocate(similar, members, free, 1) == [3]
    assert allocate(similar, members, free, 3) == [3, 6, 5]
    assert allocate(similar, members, free, 4) == [3, 6, 5, 4]  # 4 and 7 are left: more similar
    assert allocate(similar, members, free, 6) == [3, 6, 5, 4, 2, 1]
    assert allocate(similar, [[0], [1, 2]], [0, 1, 2], 3) == [0, 1, 2]  # a layer alone


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_similarity_of_layer_inputs(stream, windows, tokens, monkeypatch):
    monkeypatch.setattr("come.merge.schedules.lorp._CHUNK", 5)
    found = similarity(stream, tokens)
    states = Reference(stream.adapter.model, windows).h[:-1]
    rows = [chosen_tokens(each, tokens).flatten(0, 1) for each in states]
    for i, j in combinations(range(LAYERS), 2):
        expected = torch.cosine_similarity(rows[i], rows[j], dim=-1).mean().item()
        assert found[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert (found == found.T).all()
    assert (found.diagonal() == 1).all()


def test_lorp_drops_what_the_similarities_say(windows, caplog):
    dense = pico("llama_gqa")
    with caplog.at_level("INFO"):
        plan = compress(
            pico("llama_gqa"), windows, recipe("lorp", clusters=2), target_layers=3, progress=False
        )
    states = [each.flatten(0, 1) for each in Reference(dense, windows).h[:-1]]
    similar = torch.stack(
        [
            torch.stack([torch.cosine_similarity(a, b, dim=-1).mean() for b in states])
            for a in states
        ]
    )
    members = clusters(similar, 2)
    assert dropped_layers(plan) == allocate(similar, members, range(1, LAYERS - 1), 3)
    assert f"2 clusters: {members}" in caplog.text
    own = next(each for each in members if dropped_layers(plan)[0] in each)
    others = [i for i in own if i != dropped_layers(plan)[0]]
    expected = 1 - float(similar[dropped_layers(plan)[0], others].mean())
    assert plan.steps[0].score == pytest.approx(expected, abs=1e-5)
    shallower = compress(
        pico("llama_gqa"), windows, recipe("lorp", clusters=2), target_layers=4, progress=False
    )
    assert dropped_layers(shallower) == dropped_layers(plan)[:2]


def measured_losses(model, windows, sets):
    """The losses without each set of layers, in float64."""
    other, found = without(model, ()), []
    layers = decoder_layers(other)
    every = list(layers)
    for removed in sets:
        del layers[:]
        layers.extend(layer for i, layer in enumerate(every) if i not in removed)
        with torch.no_grad():
            found.append(float(loss(other, windows)))
    return found


def all_losses(model, windows, most):
    """The losses without every set of at most `most` layers."""
    sets = [s for size in range(most + 1) for s in combinations(range(LAYERS), size)]
    return dict(zip(sets, measured_losses(model, windows, sets), strict=True))


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
def test_losses_without_layers(stream, windows):
    model = stream.adapter.model
    sets = [(), (0,), (5,), (1, 3), (0, 2, 5)]
    assert losses_without(stream, sets) == pytest.approx(
        measured_losses(model, windows, sets), rel=1e-4
    )
    for first, others in ((0, [1, 2, 5]), (2, [4, 5]), (4, [5])):
        pairs = [(first, other) for other in others]
        expected = measured_losses(model, windows, pairs)
        found = losses_without_pairs(stream, pairs)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
def test_pairwise_drops_the_set_with_the_least_quadratic_cost(family, windows):
    dense = pico(family)
    known = all_losses(dense, windows, 2)

    def predicted(chosen):
        growth = sum(known[i,] - known[()] for i in chosen)
        for i, j in combinations(chosen, 2):
            growth += known[i, j] - known[i,] - known[j,] + known[()]
        return max([known[()] + growth, *(known[pair] for pair in combinations(chosen, 2))])

    for target in (LAYERS - 2, LAYERS - 3):
        plan = compress(
            pico(family), windows, recipe("pairwise"), target_layers=target, progress=False
        )
        best = min(combinations(range(LAYERS), LAYERS - target), key=predicted)
        assert dropped_layers(plan) == list(best)
        assert [step.score for step in plan.steps] == pytest.approx(
            [predicted(best)] * len(best), rel=1e-4
        )


def test_pairwise_leaves_protected_layers(windows):
    method = recipe("pairwise", protect_first=2, protect_last=1)
    plan = compress(pico("llama_gqa"), windows, method, target_layers=3, progress=False)
    assert dropped_layers(plan) == [2, 3, 4]


def plain_swaps(known, count, rounds):
    def best(others):
        sets = {tuple(sorted((*others, i))): i for i in range(LAYERS) if i not in others}
        least = min(sets, key=known.get)
        return known[least], sets[least]

    dropped, least = [], 0.0
    while len(dropped) < count:
        least, layer = best(dropped)
        dropped.append(layer)
    for _ in range(rounds):
        for place in range(count):
            lower, layer = best(dropped[:place] + dropped[place + 1 :])
            if lower < least - 1e-7:
                least, dropped[place] = lower, layer
    return sorted(dropped), least


def test_swaps_as_in_plain_loops(windows):
    """On two models that gain by a swap."""
    for seed in (2, 5):
        known = all_losses(pico("llama_gqa", seed), windows, 3)
        alone, swapped_once = plain_swaps(known, 3, 0), plain_swaps(known, 3, 2)
        assert swapped_once[1] < alone[1]
        for rounds, (expected, least) in ((0, alone), (2, swapped_once)):
            method = recipe("sleb_swap", schedule__rounds=rounds)
            plan = compress(
                pico("llama_gqa", seed), windows, method, target_layers=3, progress=False
            )
            assert dropped_layers(plan) == expected
            assert plan.steps[0].score == pytest.approx(least, rel=1e-4)
    sleb = compress(pico("llama_gqa", 5), windows, recipe("sleb"), target_layers=3, progress=False)
    assert sorted(dropped_layers(sleb)) == alone[0]


def test_passes_are_those_of_the_estimate(windows, tmp_path):
    """Exactly for pairs, at most for swaps; and statistics of all layers."""
    pico("llama_gqa").save_pretrained(tmp_path)
    shape = inspect_model(tmp_path, dtype="float32")
    for name, exact in (("pairwise", True), ("sleb_swap", False)):
        method = recipe(name)
        plan = compress(pico("llama_gqa"), windows, method, target_layers=3, progress=False)
        through, heads = method.schedule.passes(LAYERS, 3)
        spent = plan.provenance["layer_passes"] - LAYERS
        assert spent == through if exact else 0 < spent <= through
        found = compression_cost(
            shape, num_samples=5, seq_len=16, target=3, method=method, store="memory"
        )
        each = 2 * 80 * shape.block_parameters["layer"]
        head = 2 * 80 * shape.vocabulary * shape.hidden
        assert found.work.forward == (LAYERS + through) * each + heads * head
        assert found.extra == []


@pytest.mark.parametrize("name", ["pairwise", "sleb_swap"])
def test_no_loss_is_measured_twice(name, windows):
    """Another depth, or a resumed search, measures only the losses that are not known."""

    def found(target, trials):
        method = recipe(name)
        model = pico("llama_gqa", 5)
        return compress(model, windows, method, target_layers=target, trials=trials, progress=False)

    trials = TrialScores()
    found(4, trials)
    expected, deeper = found(3, TrialScores()), found(3, trials)
    assert dropped_layers(deeper) == dropped_layers(expected)
    assert deeper.steps[0].score == pytest.approx(expected.steps[0].score, rel=1e-6)
    spent = [plan.provenance["layer_passes"] for plan in (found(3, trials), deeper, expected)]
    assert spent[0] == LAYERS <= spent[1] < spent[2]
    key, other = list(trials.scores)[2], TrialScores()
    other.scores = {each: loss for each, loss in trials.scores.items() if each != key}
    assert LAYERS < found(3, other).provenance["layer_passes"] < spent[2]
    assert other.scores == pytest.approx(trials.scores, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "lorp"}, "merge.schedule=lorp drops layers, and merge.operator=concat"),
        ({"schedule": "lorp", "operator": "drop", "m": 3}, "single layers; merge.m=3 is not"),
        (
            {"schedule": "swap", "operator": "drop", "sublayers": ("ffn",)},
            r"merge.sublayers=\['ffn'\] is not possible .* merge.schedule=progressive",
        ),
        (
            {"schedule": "pairwise", "operator": "drop"},
            "merge.selection=sbi is not possible with it: choose merge.selection=skip_loss",
        ),
        ({"schedule": "swap", "operator": "drop"}, "choose merge.selection=skip_loss"),
    ],
)
def test_combinations_that_are_not_possible(changes, message):
    with pytest.raises(ValueError, match=message):
        paper(**changes)


def test_losses_that_are_not_finite(windows):
    model = pico("llama_gqa")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"merge.schedule=swap: the loss .* model.dtype=float32"):
        compress(model, windows, recipe("sleb_swap"), target_layers=4, progress=False)


def test_selection_has_no_effect_with_lorp():
    overrides = ["merge=lorp", "merge.selection=sbi"]
    with pytest.raises(ValueError, match="merge.selection has no effect with merge.schedule=lorp"):
        check_explicit(settings(*overrides), overrides)
