"""Merges and drops of attention or FFN alone."""

import copy

import pytest
import torch

from come.merge.loop import compress
from come.merge.operators.base import OPERATORS
from come.merge.saving import check_cache
from come.models.adapter import UNITS, ModelAdapter
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import (
    SPANS,
    dropped_layers,
    loss,
    output_names,
    paper,
    plain_units,
    scorer,
    states,
)
from tests.reference import Reference


def test_units_of_parts_are_those_of_their_own_layers(windows):
    """A merged block merged again: what is in between is silent, and not looked at."""
    gaps = 0
    for seed in range(4):
        model, snapshots = pico("llama_gqa"), [(None, pico("llama_gqa"))]
        plan = compress(
            model,
            windows,
            paper(sublayers=("ffn",), allow_remerge=True, selection="random", seed=seed),
            target_layers=2,
            on_step=lambda plan, model=model, seen=snapshots: seen.append(
                (plan, copy.deepcopy(model))
            ),
            progress=False,
        )
        for (before, merged), step in zip(snapshots, plan.steps):
            places = before.places[step.first : step.last + 1] if before else []
            if len(places) == 2 and places[1] - places[0] > 1:
                gaps += 1
                reference = Reference(merged, windows)
                scores = {u: [reference.sensitivity(place, u) for place in places] for u in UNITS}
                assert step.kept["channel"] == plain_units(scores, step.shares)["channel"]
    assert gaps > 0


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_part_is_dropped_where_the_loss_misses_it_least(family, windows, part):
    method = paper(operator="drop", selection="skip_loss", sublayers=(part,))
    model, dense = pico(family), pico(family).double()
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    gone = []
    for step in plan.steps:
        losses = {}
        for candidate in (i for i in range(LAYERS) if i not in gone):
            tried = copy.deepcopy(dense)
            for index in (*gone, candidate):
                state = ModelAdapter(tried).layer_state(index)
                for name in output_names(tried, part):
                    state[name].zero_()
            with torch.no_grad():
                losses[candidate] = float(loss(tried, windows))
        gone.append(min(losses, key=losses.get))
        assert min(losses.values()) == pytest.approx(step.score, rel=1e-4)
    assert dropped_layers(plan) == gone
    assert model.config.num_hidden_layers == LAYERS
    assert plan.places == [i for i in range(LAYERS) if i not in gone]
    for index in range(LAYERS):
        old, new = (ModelAdapter(m).layer_state(index) for m in (pico(family), model))
        for name in old:
            silent = index in gone and name in output_names(model, part)
            expected = torch.zeros_like(old[name]) if silent else old[name]
            assert torch.equal(new[name], expected), name
    assert check_cache(model) < 1e-4


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_scores_of_parts_begin_and_end_inside_layers(family, windows, part):
    model = pico(family)
    reference = Reference(model, windows)
    middle = []
    norm = {"opt": "final_layer_norm"}.get(model.config.model_type, "post_attention_layernorm")
    for layer in reference.layers:
        layer.get_submodule(norm).register_forward_pre_hook(
            lambda m, a: middle.append(a[0].reshape(*windows.shape, -1))
        )
    with torch.no_grad():
        reference.model(windows, use_cache=False)
    adapter = ModelAdapter(model)
    with LayerStream(adapter, windows, batch_size=2, progress=False, block=part) as stream:
        stream.embed()
        collector = StatisticsCollector(adapter, (), "all")
        stream.advance(0, LAYERS - 1, collector)
        for first, last in SPANS:
            x = reference.h[first] if part == "attention" else middle[first]
            y = middle[last] if part == "attention" else reference.h[last + 1]
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            found = scorer("cosine", "all").score(stream, first, last)
            assert found == pytest.approx(float(1 - cosine.mean()), rel=1e-3, abs=1e-6)
            if first == last:
                bi = float((1 - cosine.clamp(0, 1)).mean())
                assert collector.found[first].bi == pytest.approx(bi, rel=1e-3, abs=1e-6)


def test_a_merged_part_stands_in_its_first_layer(family, windows):
    for part in ("attention", "ffn"):
        method = paper(sublayers=(part,), groups=((1, 2), (4, 5)))
        model, whole = pico(family), pico(family)
        plan = compress(model, windows, method, target_layers=4, progress=False)
        assert plan.history == [[0], [1, 2], [3], [4, 5]]
        adapter, roles = ModelAdapter(model), ModelAdapter(whole).roles
        step = plan.steps[0]
        merged = OPERATORS.create("concat").merge(
            states(whole, 1, 2), roles, step.shares, step.kept
        )
        own = adapter.block_tensors(part)
        for name, tensor in adapter.layer_state(1).items():
            expected = merged[name] if name in own else states(whole, 1)[0][name]
            assert torch.equal(tensor, expected)
        for name in output_names(model, part):
            assert not adapter.layer_state(2)[name].any()
