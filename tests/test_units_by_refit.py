"""Joint selection of units, against plain float64."""

from dataclasses import replace

import pytest
import torch

from come.linalg.equations import eliminate, unit_columns
from come.merge.joint_selection import (
    Features,
    Residual,
    SourceLayer,
    stacked_equations,
    states_after_kept,
)
from come.merge.loop import compress
from come.merge.reconstruction import ReconstructionTargets
from come.merge.retention.adaptive import Adaptive
from come.merge.stacked_map import StackedMap
from come.models.adapter import ModelAdapter
from come.models.layer_state import overlay
from come.models.sublayers import hidden_features, states_after
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, pico
from tests.methods import decoder_layers, paper, recipe, span_of, sublayer_of, without
from tests.reference import Reference
from tests.test_refit import activations, plain_ridge

FAMILIES = ["llama_gqa", "llama_bias", "opt"]


@pytest.fixture
def streamed(windows):
    """Factory for streams of pico models after their first pass."""
    opened = []

    def make(family, batch_size=2):
        stream = LayerStream(
            ModelAdapter(pico(family)), windows, batch_size=batch_size, progress=False
        )
        opened.append(stream)
        stream.embed()
        stream.advance(0, LAYERS - 1)
        stream.snapshot_dense()
        return stream

    yield make
    for stream in opened:
        stream.__exit__(None, None, None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stacked_gram_of_a_span(family, windows, streamed):
    """Layers 2 and 3 both read h_2: moments from models in which each of them follows layer 1."""
    targets = ReconstructionTargets(streamed(family), 2, 3, original=3)
    dense = Reference(pico(family), windows)
    shortened = Reference(without(pico(family), {2}), windows)  # layer 3 reads h_2
    weights = 1 / dense.h[4].flatten(0, 1).square().mean(dim=1)

    def added(index):
        return dense.output(index, "kv_group")(dense.inputs[index, "kv_group"])

    heads = torch.cat([dense.inputs[2, "kv_group"], shortened.inputs[2, "kv_group"]], dim=1)
    attention, ffn = (sublayer_of(targets.stream.adapter, unit) for unit in ("kv_group", "channel"))
    initial = StackedMap(targets, attention).read()
    layers = [SourceLayer(targets.stream.adapter.layer_state(index)) for index in (2, 3)]
    residual = Residual(span_of(targets.stream, paper()))
    held = Features(targets, attention, layers, residual, hold=True)
    sums = stacked_equations(held)
    width = heads.shape[1]
    expected = (heads * weights[:, None]).T @ heads
    torch.testing.assert_close(sums.gram[:width, :width], expected, rtol=1e-3, atol=1e-4)
    expected = (heads * weights[:, None]).T @ (added(2) + added(3))
    torch.testing.assert_close(sums.moment[:width], expected, rtol=1e-3, atol=1e-4)

    columns = unit_columns([0], attention.columns)
    chosen = type(initial)(initial.weight[:, columns], initial.bias)
    post_attention = dense.h[2].flatten(0, 1) + heads[:, columns] @ chosen.weight.double().T
    post_attention = post_attention if chosen.bias is None else post_attention + chosen.bias
    found = states_after_kept(held, chosen, [columns, columns[:0]])
    expected = post_attention.view(found.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    channels = torch.cat([activations(dense.layers[i], post_attention) for i in (2, 3)], dim=1)
    residual.after[attention.name] = found
    sums = stacked_equations(Features(targets, ffn, layers, residual))
    width = channels.shape[1]
    expected = (channels * weights[:, None]).T @ channels
    torch.testing.assert_close(sums.gram[:width, :width], expected, rtol=1e-3, atol=1e-4)
    expected = (channels * weights[:, None]).T @ (dense.h[4].flatten(0, 1) - post_attention)
    torch.testing.assert_close(sums.moment[:width], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("align", [None, 0.01])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trial_reuses_the_solution_of_the_selection(family, align, streamed):
    """Its output maps are ridge regressions on the activations of the trial layer."""
    stream = streamed(family)
    adapter, method = stream.adapter, recipe("come_plus", refit__align=align)
    span = span_of(stream, method)
    split = method.retention.trial_split(span)
    sources = span.sources(split)
    found = method.refit.surrogate.solve(span.targets, sources)
    layer = adapter.copy_layer(2, overlay(sources.state, found))
    layout, attention = adapter.layer_layout(2), sublayer_of(adapter, "kv_group")
    solved = 0
    for unit in ("kv_group", "channel"):
        sublayer = sublayer_of(adapter, unit)
        features, targets, weights = [], [], []
        for batch in span.targets:
            keywords = stream.keywords(len(batch.states), 2)
            post_attention = states_after(layer, layout, attention, batch.states, keywords)
            read, target = (batch.states, batch.missing(attention, batch.states))
            if unit == "channel":
                read, target = post_attention, batch.output - post_attention
            found_features = hidden_features(layer, layout, sublayer, read, keywords)
            features.append(found_features.flatten(0, 1).double())
            targets.append(target.flatten(0, 1).double())
            weights.append(batch.weights.double())
        # the penalty of the selection: 0.1 times the mean square of all units of the span
        inputs = split.solved[unit].inputs
        assert len(inputs) == (2 if align else 0)
        layers = [
            SourceLayer(state, {sublayer.norm.module: inputs[i]} if align else {})
            for i, state in enumerate(sources.layers)
        ]
        residual = Residual(span)
        if unit == "channel":
            residual.after[attention.name] = attention_outputs(span.targets, layer)
        sums = stacked_equations(Features(span.targets, sublayer, layers, residual))
        penalty = 0.1 * sums.mean_diagonal()
        name, *bias = adapter.output_tensors(2, sublayer)
        data = torch.cat(features), torch.cat(targets), torch.cat(weights)
        start = sources.state[bias[0]] if bias else None
        weight, constant = plain_ridge(*data, sources.state[name], start, penalty)
        torch.testing.assert_close(found[name].double(), weight, rtol=2e-3, atol=2e-5)
        if bias:
            torch.testing.assert_close(found[bias[0]].double(), constant, rtol=2e-3, atol=2e-4)
        solved += 1
    assert solved == 2


def attention_outputs(targets, layer):
    """The residual stream after a layer's attention for all windows."""
    stream, layout = targets.stream, targets.layout
    return torch.cat(
        [
            states_after(
                layer,
                layout,
                layout.sublayer("attention"),
                batch.states,
                stream.keywords(len(batch.states), 2),
            )
            for batch in targets
        ]
    )


@pytest.mark.parametrize(("rate", "trial_rate"), [(0.3, 0.7), (0.9, 0.9)])
def test_trials_eliminate_in_fewer_rounds(rate, trial_rate, streamed, monkeypatch):
    stream, rates = streamed("llama_gqa"), []

    def counted(sums, initial, penalty, keep, size, rate, **rest):
        rates.append(rate)
        return eliminate(sums, initial, penalty, keep, size, rate, **rest)

    monkeypatch.setattr("come.merge.retention.adaptive.eliminate", counted)
    method = recipe("come_plus", rate=rate)
    span = span_of(stream, method)
    assert method.retention.trial_split(span).solved.keys() == {"kv_group", "channel"}
    assert not method.retention.split(span).solved
    assert rates == [0.0, trial_rate, 0.0, rate]


@pytest.mark.parametrize("changes", [{"refit__lambda": "auto"}, {"refit__sublayers": ["ffn"]}])
def test_refit_with_other_settings_does_not_reuse_the_solution(changes, streamed):
    stream, method = streamed("llama_gqa"), recipe("come_plus", refit="ridge", **changes)
    span = span_of(stream, method)
    sources = span.sources(method.retention.trial_split(span))
    with_choice = method.refit.solve(span.targets, sources)
    without_choice = method.refit.solve(span.targets, replace(sources, solved={}))
    assert with_choice.keys() == without_choice.keys()
    for name, tensor in with_choice.items():
        assert torch.equal(tensor, without_choice[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_leverage_equals_its_eigenvector_formula(family, streamed):
    """By the eigenvectors of G: l_j = sum_i v_ij^2 s_i / (s_i + mu)."""
    targets = ReconstructionTargets(streamed(family), 1, 3, original=3)
    layers = [SourceLayer(targets.stream.adapter.layer_state(index)) for index in (1, 2, 3)]
    attention = sublayer_of(targets.stream.adapter, "kv_group")
    residual = Residual(span_of(targets.stream, paper(), [1, 2, 3]))
    sums = stacked_equations(Features(targets, attention, layers, residual))
    gram = sums.gram[: sums.width, : sums.width]
    penalty = 0.1 * sums.mean_diagonal()
    vectors = torch.linalg.eigh(gram)
    shrunk = vectors.eigenvalues / (vectors.eigenvalues + penalty)
    expected = (vectors.eigenvectors.square() * shrunk).sum(dim=1)
    found = sums.leverage(penalty)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert ((found >= 0) & (found < 1)).all()
    # the sum over units is the effective number of dimensions
    assert float(found.sum()) == pytest.approx(float(shrunk.sum()))


@pytest.mark.parametrize("retention", ["adaptive", "leverage"])
def test_kept_units_add_up_to_one_layer(family, retention, windows):
    method = paper(retention=retention, norms="fold", m=3)
    plan = compress(pico(family), windows, method, target_layers=4, progress=False)
    counts = ModelAdapter(pico(family)).unit_counts
    for unit, layers in plan.steps[0].kept.items():
        assert sum(map(len, layers)) == counts[unit]
        assert all(layer == sorted(set(layer)) for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_drop_of_the_first_layer_refits_the_second(family, windows):
    model, dense = pico(family), Reference(pico(family), windows)
    shortened = Reference(without(pico(family), {0}), windows)  # layer 1 reads h_0
    method = paper(
        operator="drop", protect_last=LAYERS - 1, refit="ridge", refit__sublayers=["attention"]
    )
    plan = compress(model, windows, method, target_layers=LAYERS - 1, progress=False)
    assert (plan.steps[0].first, plan.steps[0].last, plan.steps[0].kept_layer) == (0, 1, 1)

    heads = shortened.inputs[0, "kv_group"]
    target = sum(dense.output(i, "kv_group")(dense.inputs[i, "kv_group"]) for i in (0, 1))
    weights = 1 / dense.h[2].flatten(0, 1).square().mean(dim=1)
    old = dense.output(1, "kv_group")
    penalty = 0.1 * (weights[:, None] * heads.square()).sum(dim=0).mean()
    weight, _ = plain_ridge(heads, target, weights, old.weight, old.bias, float(penalty))
    layer = decoder_layers(model)[0].self_attn
    found = layer.out_proj if dense.is_opt else layer.o_proj
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-2, atol=1e-4)


def test_auto_lambda_does_not_depend_on_the_batch_size(windows):
    found = []
    for batch_size in (1, 2, 5):
        model = pico("llama_bias")
        method = paper(groups=((2, 3),), refit="ridge", refit__lambda="auto")
        compress(model, windows, method, target_layers=5, batch_size=batch_size, progress=False)
        found.append(decoder_layers(model)[2].mlp.down_proj.weight)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-5)


def test_refit_error_rejects_laco_schedule():
    with pytest.raises(ValueError, match="selection=refit_error merges a shortlist on trial, and"):
        paper(selection="refit_error", schedule="laco", operator="laco")


@pytest.mark.parametrize(
    ("family", "ratio", "expected"),
    [
        ("llama_gqa", 0.1, [torch.float64, torch.float32]),
        ("llama_gqa", 1e-4, [torch.float64, torch.float64]),
        ("opt", 0.1, [torch.float64, torch.float64]),
    ],
)
def test_only_channels_are_chosen_in_float32(family, ratio, expected, windows, monkeypatch):
    """Attention outputs are also solved for, and a small penalty or a bias needs float64."""
    dtypes = []

    def choose(rule, sums, *rest):
        dtypes.append(sums.gram.dtype)
        return Adaptive.choose(rule, sums, *rest)

    class Spy(Adaptive):
        pass

    monkeypatch.setattr(Spy, "choose", choose)
    method = paper(retention="adaptive", refit="ridge", refit__lambda=ratio)
    method.retention = Spy()
    compress(pico(family), windows, method, target_layers=LAYERS - 1, progress=False)
    assert dtypes == expected


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize("unit", ["kv_group", "channel"])
def test_stacked_map_of_chosen_columns(family, unit, windows):
    """Equals the columns of the projections side by side; biases are summed over all layers."""
    adapter = ModelAdapter(pico(family))
    with LayerStream(adapter, windows, progress=False) as stream:
        targets = ReconstructionTargets(stream, 1, 3, original=3)
        sublayer = sublayer_of(adapter, unit)
        found = StackedMap(targets, sublayer)
        name, *bias = adapter.output_tensors(1, sublayer)
        states = [adapter.layer_state(index) for index in (1, 2, 3)]
        whole = torch.cat([state[name] for state in states], dim=1)
        assert torch.equal(found.read().weight, whole)
        columns = torch.tensor([0, 2, whole.shape[1] // 2, whole.shape[1] - 1])
        own = found.columns(columns)
        assert torch.equal(own.weight, whole[:, columns])
        if bias:
            total = sum(state[bias[0]].double() for state in states)
            assert torch.equal(own.bias, total)
        else:
            assert own.bias is None


@pytest.mark.parametrize(("tokens", "count"), [(None, 1), (16, 2)])
def test_fit_reads_the_targets_of_the_choice(tokens, count, windows, monkeypatch):
    """Unless units are chosen on fewer tokens."""
    made = []
    initialise = ReconstructionTargets.__init__

    def recorded(self, *arguments, **options):
        initialise(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(ReconstructionTargets, "__init__", recorded)
    method = paper(retention="adaptive", refit="ridge")
    method.retention.tokens = tokens
    compress(pico("llama_gqa"), windows, method, target_layers=LAYERS - 1, progress=False)
    assert len(made) == count
