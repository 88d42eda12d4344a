"""LaCo, drops, and the closed-form repairs PruneComp and ReplaceMe against their definitions."""

import copy

import pytest
import torch

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.method import groups_target
from come.merge.operators.base import OPERATORS
from come.merge.plan import Plan
from come.merge.schedules.laco import LaCo
from come.models.adapter import ModelAdapter
from tests.conftest import LAYERS, pico
from tests.methods import (
    decoder_layers,
    paper,
    recipe,
    same_weights,
    sublayer_of,
    without,
)
from tests.reference import UNITS, Reference


def test_laco_sums_parameter_differences(family):
    adapter = ModelAdapter(pico(family))
    layers = [adapter.layer_state(i) for i in (1, 2, 3)]
    merged = OPERATORS.create("laco").merge(layers, adapter.roles(), [1 / 3] * 3, {})
    released = OPERATORS.create("laco_released").merge(layers, adapter.roles(), [1 / 3] * 3, {})
    for name in merged:
        a, b, c = (layer[name].double() for layer in layers)
        expected = a + (b - a) + (c - a)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-5)
        norms = [sublayer_of(adapter, unit).norm.module for unit in UNITS]
        is_norm = name.rpartition(".")[0] in norms
        assert torch.equal(released[name], layers[0 if is_norm else 2][name])
    pair = OPERATORS.create("laco").merge(layers[:2], adapter.roles(), [0.5, 0.5], {})
    for name, tensor in pair.items():
        torch.testing.assert_close(tensor, layers[1][name])


def test_drop_equals_the_model_without_the_layers(family, windows):
    dense = pico(family)
    for groups, removed in ((((2, 3, 4),), (3, 4)), (((0, 1),), (1,))):
        model = pico(family)
        method = paper(operator="drop", groups=groups)
        compress(model, windows, method, target_layers=LAYERS - len(removed), progress=False)
        expected = without(dense, removed)(windows, use_cache=False).logits
        torch.testing.assert_close(model(windows).logits.double(), expected, rtol=1e-3, atol=1e-4)
    model = pico(family)
    method = paper(operator="drop", selection="reverse", protect_last=LAYERS - 2)
    plan = compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    assert plan.history[0] == [0, 1, 2]  # no layer before: the one after is kept
    expected = without(dense, (0, 1))(windows, use_cache=False).logits
    torch.testing.assert_close(model(windows).logits.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("span", [(0, 1), (2, 3)])
def test_prune_comp_equals_scaling_the_hidden_states(family, windows, span):
    dense = pico(family)
    h = Reference(dense, windows).h
    first, last = span
    alpha = h[last + 1].norm(dim=-1).mean() / h[first].norm(dim=-1).mean()
    scaled = without(dense, range(first, last + 1))
    decoder_layers(scaled)[first].register_forward_pre_hook(lambda m, a: (a[0] * alpha, *a[1:]))
    expected = scaled(windows, use_cache=False).logits
    model, m = pico(family), 3
    protect = {"protect_first": first, "protect_last": LAYERS - 1 - last}
    method = paper(operator="drop", refit="prune_comp", selection="bi_sum", m=m, **protect)
    compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
    found = model(windows).logits.double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_replaceme_is_a_least_squares_map(family, windows):
    windows = torch.randint(3, 300, (12, 16), generator=torch.Generator().manual_seed(1))
    dense = pico(family)
    reference = Reference(dense, windows)
    outputs = []
    hook = reference.output(1, "channel").register_forward_hook(
        lambda module, inputs, output: outputs.append(output.detach().reshape(-1, 32))
    )
    with torch.no_grad():
        reference.model(windows, use_cache=False)
    hook.remove()
    m, h = outputs[0], [state.flatten(0, 1) for state in reference.h]
    transform = torch.linalg.lstsq(m, m + h[4] - h[2]).solution
    method = paper(operator="drop", refit="replaceme", groups=((1, 2, 3),))
    model = pico(family)
    plan = compress(model, windows, method, target_layers=4, progress=False)
    old, new = ModelAdapter(dense), ModelAdapter(model)
    ffn = sublayer_of(old, "channel")
    before, after = old.output_map(1, ffn), new.output_map(1, ffn)
    weight = transform.T @ before.weight.double()
    torch.testing.assert_close(after.weight.double(), weight, rtol=1e-2, atol=1e-3)
    if before.bias is not None:
        bias = transform.T @ before.bias.double()
        torch.testing.assert_close(after.bias.double(), bias, rtol=1e-2, atol=1e-3)
    assert set(plan.steps[0].solved.hashes) == set(new.output_tensors(1, ffn))
    for name, tensor in new.layer_state(1).items():
        if name not in plan.steps[0].solved.hashes:
            assert torch.equal(tensor, old.layer_state(1)[name])


@pytest.mark.parametrize("name", ["replaceme", "prune_comp"])
def test_old_plans_with_a_repair_as_operator_are_loaded(name, windows, tmp_path):
    model = pico("llama_gqa")
    plan = compress(model, windows, recipe(name), target_layers=4, progress=False)
    plan.save(tmp_path / "plan.json")
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"operator": "drop"', f'"operator": "{name}"'))
    assert f'"{name}"' in path.read_text()
    assert same_weights(apply(Plan.load(path), pico("llama_gqa")), model)


def test_laco_keeps_merges_that_leave_the_output_similar(windows):
    model = pico("llama_gqa")
    snapshots = []
    options = {"threshold": 0.9, "interval": 1, "relax": 0.1, "trial_windows": 5}
    method = recipe("laco", m=2, options=options)
    plan = compress(
        model,
        windows,
        method,
        target_layers=LAYERS - 2,
        on_step=lambda plan: snapshots.append(copy.deepcopy(model)),
        progress=False,
    )
    dense = Reference(pico("llama_gqa"), windows).h[-1]
    for step, snapshot in zip(plan.steps, snapshots):
        after = Reference(snapshot, windows).h[-1]
        cosine = torch.nn.functional.cosine_similarity(after, dense, dim=-1).mean()
        assert 1 - step.score == pytest.approx(float(cosine), rel=1e-4)
        tried = [c for c in step.candidates if (c.first, c.last) != (step.first, step.last)]
        assert all(c.first > step.first or c.score >= step.score for c in tried)


def test_laco_walks_down_by_its_interval(windows, monkeypatch):
    tried = []

    def similarity(self, search, first, last):
        tried.append((first, last, round(self.threshold, 2)))
        return 0.8

    monkeypatch.setattr(LaCo, "_similarity", similarity)
    method = recipe("laco", m=2, options={"threshold": 0.9, "interval": 3, "relax": 0.06})
    plan = compress(pico("llama_gqa"), windows, method, target_layers=4, progress=False)
    assert tried == [*((i, i + 1, 0.9) for i in (4, 3, 2, 1, 0)), (1, 2, 0.78)]
    assert [(s.first, s.last) for s in plan.steps] == [(4, 5), (1, 2)]
    assert [c.score for c in plan.steps[0].candidates] == pytest.approx([0.2] * 5)


def test_laco_takes_any_stop(windows):
    plan = compress(
        pico("llama_gqa"), windows, recipe("laco"), target_layers=4, stops=[5], progress=False
    )
    assert plan.num_layers == 4


def test_groups_end_in_the_model():
    assert groups_target([[4, 5]], 6) == 5
    with pytest.raises(ValueError, match="layers are 0 to 5"):
        groups_target([[5, 6]], 6)
