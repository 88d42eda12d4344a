"""Alignment of the input maps of merged units, against plain float64."""

import math

import pytest
import torch

from come.merge.alignment import fold_input_transform, input_maps
from come.merge.apply import apply, source_layers_of
from come.merge.loop import compress
from come.merge.operators.base import OPERATORS
from come.merge.refit.ridge import Ridge
from come.models.adapter import ModelAdapter
from tests.conftest import LAYERS, pico
from tests.methods import come_plus, paper, sublayer_of
from tests.reference import Reference

FAMILIES = ["llama_mha", "llama_gqa", "llama_bias", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ratio", "alike"), [(1e-3, False), (1.0, False), (0.1, True)])
@torch.no_grad()
def test_input_maps_are_the_ridge_solution(family, ratio, alike, targets, windows):
    """Layer 3 of the span reads h_2 instead of h_3: stacked least squares in float64.

    A window's first token has the weight of all its others, or 1 if all windows start alike.
    """
    if alike:
        windows = torch.cat([torch.full_like(windows[:, :1], 5), windows[:, 1:]], dim=1)
    targets, sources = targets(family, windows)
    adapter = targets.stream.adapter
    layers = [adapter.copy_layer(2, state) for state in sources.layers]
    attention = sublayer_of(adapter, "kv_group")
    norms = [adapter.copy_norm(2, attention, state) for state in sources.layers]
    maps = input_maps(targets, attention, norms[0], norms, lambda batch: batch.states, ratio)

    dense = Reference(pico(family), windows)
    name = attention.norm.module

    def normed(layer, states):
        return layer.get_submodule(name).double()(states.flatten(0, 1).double())

    x, y = normed(layers[0], dense.h[2]), normed(layers[1], dense.h[3])
    seq = windows.shape[1]
    roots = torch.ones(windows.shape, dtype=torch.float64)
    roots[:, 0] = 1 if alike else (seq - 1) ** 0.5
    x, y = (roots.reshape(-1, 1) * states for states in (x, y))
    penalty = (ratio * x.square().sum(dim=0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    rows = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, penalty @ eye])).solution.T
    torch.testing.assert_close(maps[0].double(), eye, rtol=0, atol=1e-5)  # the first layer stays
    torch.testing.assert_close(maps[1].double(), rows, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_input_maps_of_the_mlp(targets, windows):
    """Both layers' inputs from the merged layer's, also after the attention's maps are cached."""
    found, sources = targets("llama_gqa")
    adapter = found.stream.adapter
    attention, ffn = (sublayer_of(adapter, unit) for unit in ("kv_group", "channel"))
    norms = [adapter.copy_norm(2, ffn, state) for state in sources.layers]
    heads = [adapter.copy_norm(2, attention, state) for state in sources.layers]
    input_maps(found, attention, heads[0], heads, lambda batch: batch.states, 0.1)
    maps = input_maps(found, ffn, norms[0], norms, lambda batch: batch.states, 0.1)

    dense = Reference(pico("llama_gqa"), windows)
    x = norms[0].double()(dense.h[2]).flatten(0, 1)
    roots = torch.ones(windows.shape, dtype=torch.float64)
    roots[:, 0] = (windows.shape[1] - 1) ** 0.5
    x = roots.reshape(-1, 1) * x
    gram, eye = x.T @ x, torch.eye(x.shape[1], dtype=torch.float64)
    penalty = 0.1 * float(gram.diagonal().mean()) * eye
    for index, norm, own in zip((2, 3), norms, maps, strict=True):
        added = dense.output(index, "channel")(dense.inputs[index, "channel"])
        y = roots.reshape(-1, 1) * norm.double()(dense.h[index + 1].flatten(0, 1) - added)
        expected = torch.linalg.solve(gram + penalty, x.T @ y + penalty).T
        torch.testing.assert_close(own.double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fold_input_transform_changes_only_input_projections(targets, monkeypatch):
    monkeypatch.setattr("come.merge.alignment.BLOCK", 5)
    targets, sources = targets("llama_bias")
    adapter, state = targets.stream.adapter, sources.layers[1]
    change = torch.randn(32, 32, dtype=torch.float64)
    found = fold_input_transform(adapter.roles(2), sublayer_of(adapter, "channel"), state, change)
    touched = {name for name in state if not torch.equal(state[name], found[name])}
    assert touched == {f"mlp.{kind}_proj.weight" for kind in ("gate", "up")}
    states = torch.randn(5, 32)
    expected = state["mlp.up_proj.weight"] @ (change.float() @ states.T)
    torch.testing.assert_close(found["mlp.up_proj.weight"] @ states.T, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_large_penalty_keeps_the_input_maps(family, targets):
    targets, sources = targets(family)
    plain = Ridge().solve(targets, sources)
    penalised = Ridge(align=1e9).solve(targets, sources)
    assert set(penalised) > set(plain)
    for name, tensor in penalised.items():
        torch.testing.assert_close(
            tensor, plain.get(name, sources.state[name]), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", ["concat", "drop", "average", "laco"])
def test_plan_rebuilds_an_aligned_model(family, operator, windows, tmp_path):
    retention = "adaptive" if operator == "concat" else "bi_power"
    method = paper(operator=operator, retention=retention, norms="fold", refit="ridge", align=0.01)
    model = pico(family)
    plan = compress(model, windows, method, target_layers=4, progress=False)
    queries = sublayer_of(ModelAdapter(pico(family)), "kv_group").inputs[0].name
    inputs = f"{queries}.weight"
    assert all(inputs in step.solved.tensors for step in plan.steps)
    again = apply(plan, pico(family))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_alignment_reaches_layers_that_an_operator_mixes(targets):
    """The average of aligned input projections differs from that of the layers' own."""
    found, _ = targets("llama_gqa")
    adapter = found.stream.adapter
    sources = source_layers_of(adapter, [2, 3], OPERATORS.create("average"), "fold", [0.5, 0.5], {})
    solved = Ridge(align=0.01).solve(found, sources)
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
        assert not torch.allclose(solved[name], sources.state[name], atol=1e-3)


@pytest.mark.parametrize("retention", ["adaptive", "bi_power"])
def test_alignment_lowers_the_error_of_the_span(retention, windows):
    """Three layers merged into one, on the calibration text."""
    errors = []
    for ratio in (None, 1e-3):
        method = paper(
            retention=retention, norms="fold", refit="ridge", refit__lambda=1e-3, m=3,
            align=ratio, groups=[[2, 3, 4]],
        )  # fmt: skip
        model = pico("llama_gqa")
        compress(model, windows, method, target_layers=LAYERS - 2, progress=False)
        dense = Reference(pico("llama_gqa"), windows).h[5]
        errors.append(float((Reference(model, windows).h[3] - dense).square().mean()))
    assert errors[1] < errors[0]


def test_mixed_schedule_varies_sizes_and_reaches_every_stop(windows):
    """Picks the lowest angle per removed layer among spans of 2 to 4 layers, and skips no stop."""
    seen = []
    method = come_plus(m=4, schedule="mixed", selection="angular")
    plan = compress(
        pico("llama_gqa"), windows, method, target_layers=2, stops=[4], progress=False,
        on_step=lambda plan: seen.append(plan.num_layers),
    )  # fmt: skip
    assert 4 in seen
    assert seen[-1] == 2
    step = plan.steps[0]
    assert len({c.last - c.first for c in step.candidates}) == 2  # 2 or 3 layers: 6 to 4 at most
    assert step.score == min(c.score for c in step.candidates)
    states = Reference(pico("llama_gqa"), windows).h
    for c in step.candidates:
        cosine = torch.cosine_similarity(states[c.first], states[c.last + 1], dim=-1)
        angle = float(torch.arccos(cosine).mean()) / math.pi
        assert c.score == pytest.approx(angle / (c.last - c.first), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"align": 0.0, "refit": "ridge"},
            "merge.refit.align=0.0: must be a number above 0, or null",
        ),
        ({"align": 0.01, "refit": "ridge"}, "merge.norms=mean.*choose merge.norms=fold"),
        ({"schedule": "mixed", "operator": "drop"}, "choose merge.schedule=progressive"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(**settings)


def test_alignment_affects_the_chosen_units(windows):
    """The elimination scores units after their input maps are aligned."""
    kept = []
    for ratio in (None, 1e-3, 10.0):
        method = paper(
            retention="adaptive", norms="fold", refit="ridge", align=ratio, groups=[[2, 3]]
        )
        plan = compress(
            pico("llama_gqa"), windows, method, target_layers=LAYERS - 1, progress=False
        )
        kept.append(plan.steps[0].kept["channel"])
    assert kept[0] != kept[1]
    assert kept[1] != kept[2]
