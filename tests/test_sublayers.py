"""Merges and drops of only the attention or only the FFN sublayers."""

import copy

import pytest
import torch

from come.merge.loop import compress
from come.merge.operators.base import OPERATORS
from come.merge.saving import check_cache
from come.models.adapter import ModelAdapter
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
from tests.reference import UNITS, Reference


def test_remerged_sublayers_use_the_scores_of_their_own_layers(windows):
    """The zeroed sublayers between two remerged ones are ignored."""
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
def test_dropped_sublayer_has_the_lowest_loss_increase(family, windows, part):
    method = paper(operator="drop", selection="skip_loss", sublayers=(part,))
    model, dense = pico(family), pico(family).double()
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    removed = []
    for step in plan.steps:
        losses = {}
        for candidate in (i for i in range(LAYERS) if i not in removed):
            tried = copy.deepcopy(dense)
            for index in (*removed, candidate):
                state = ModelAdapter(tried).layer_state(index)
                for name in output_names(tried, part):
                    state[name].zero_()
            with torch.no_grad():
                losses[candidate] = float(loss(tried, windows))
        removed.append(min(losses, key=losses.get))
        assert min(losses.values()) == pytest.approx(step.score, rel=1e-4)
    assert dropped_layers(plan) == removed
    assert model.config.num_hidden_layers == LAYERS
    assert plan.places == [i for i in range(LAYERS) if i not in removed]
    for index in range(LAYERS):
        old, new = (ModelAdapter(m).layer_state(index) for m in (pico(family), model))
        for name in old:
            zeroed = index in removed and name in output_names(model, part)
            expected = torch.zeros_like(old[name]) if zeroed else old[name]
            assert torch.equal(new[name], expected), name
    assert check_cache(model) < 1e-4


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_sublayer_scores_use_the_states_between_attention_and_ffn(family, windows, part):
    model = pico(family)
    reference = Reference(model, windows)
    post_attention = []
    norm = {"opt": "final_layer_norm"}.get(model.config.model_type, "post_attention_layernorm")
    for layer in reference.layers:
        layer.get_submodule(norm).register_forward_pre_hook(
            lambda m, a: post_attention.append(a[0].reshape(*windows.shape, -1))
        )
    with torch.no_grad():
        reference.model(windows, use_cache=False)
    adapter = ModelAdapter(model)
    with LayerStream(adapter, windows, batch_size=2, progress=False, block=part) as stream:
        stream.embed()
        collector = StatisticsCollector(adapter, (), "all")
        stream.advance(0, LAYERS - 1, collector)
        for first, last in SPANS:
            x = reference.h[first] if part == "attention" else post_attention[first]
            y = post_attention[last] if part == "attention" else reference.h[last + 1]
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            found = scorer("cosine", "all").score(stream, first, last)
            assert found == pytest.approx(float(1 - cosine.mean()), rel=1e-3, abs=1e-6)
            if first == last:
                bi = float((1 - cosine.clamp(0, 1)).mean())
                assert collector.found[first].bi == pytest.approx(bi, rel=1e-3, abs=1e-6)


def test_merged_sublayer_is_in_the_first_layer_of_its_span(family, windows):
    for part in ("attention", "ffn"):
        method = paper(sublayers=(part,), groups=((1, 2), (4, 5)))
        model, whole = pico(family), pico(family)
        plan = compress(model, windows, method, target_layers=4, progress=False)
        assert plan.history == [[0], [1, 2], [3], [4, 5]]
        adapter, roles = ModelAdapter(model), ModelAdapter(whole).roles()
        step = plan.steps[0]
        merged = OPERATORS.create("concat").merge(
            states(whole, 1, 2), roles, step.shares, step.kept
        )
        own = adapter.block_tensors(1, part)
        for name, tensor in adapter.layer_state(1).items():
            expected = merged[name] if name in own else states(whole, 1)[0][name]
            assert torch.equal(tensor, expected)
        for name in output_names(model, part):
            assert not adapter.layer_state(2)[name].any()
