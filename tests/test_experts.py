"""Mixtures of experts: features, merging, refits and scores of experts and of shared experts."""

import pytest
import torch

from come.merge.loop import compress
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.models.adapter import ModelAdapter
from come.models.layout import Part
from come.models.sublayers import activation_derivative, hidden_features, run_layer, states_after
from come.statistics.gradients import path_gradients, weight_gradients
from come.statistics.layer_statistics import StatisticsCollector
from come.stream.stream import LayerStream
from tests.decoder_configs import KEYS
from tests.decoders import pico_decoder
from tests.methods import paper, slowly

EXPERTS = {
    "mixtral": {},
    "gpt_oss": {},  # biases, transposed and interleaved
    "llama4_text": {},  # weights multiply the inputs
    "dbrx": {},  # experts below each other
    "glm4_moe": {"n_group": 1, "topk_group": 1},  # correction bias, shared expert
    "glm4_moe (groups)": {},
    "qwen2_moe": {},  # gated shared expert
    "granitemoeshared": {},  # fused shared expert, a constant factor
}


ALL_PICKED = {
    "gpt_oss": {"num_experts_per_tok": 8},
    "qwen2_moe": {"num_experts_per_tok": 8},
    "llama4_text": {"num_experts_per_tok": 8},
    "dbrx": {"ffn_config": {**KEYS["dbrx"]["ffn_config"], "moe_top_k": 8}},
}


def named(name, **keys):
    model = pico_decoder(name.split()[0], **EXPERTS.get(name, {}), **keys).to(torch.float64)
    model.config._experts_implementation = "eager"  # the others compute in float32 at most
    return model


def tokens(model, windows=6, seq=20):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (windows, seq), generator=generator)


def states_of(model):
    adapter = ModelAdapter(model)
    return adapter, *adapter.layer_inputs(tokens(model))


def sparse_layers(adapter):
    return [i for i, layout in enumerate(adapter.layout.layers) if layout.routed]


def routing(layer, sublayer, states, keywords):
    """What the experts are called with."""
    seen = []

    def hook(module, inputs, keywords):
        seen.append((*inputs, *keywords.values()))

    handle = layer.get_submodule(sublayer.output).register_forward_pre_hook(hook, with_kwargs=True)
    run_layer(layer, states, keywords)
    handle.remove()
    return seen[0]


def by_expert(layer, experts, given):
    """The output of each expert by itself, times its weights, [experts, tokens, hidden]."""
    module = layer.get_submodule(experts.module)
    found = []
    for expert in range(experts.count):
        if experts.weighted:
            only = torch.zeros_like(given[0]).view(experts.count, -1, given[0].shape[-1])
            only[expert] = given[0].view_as(only)[expert]
            each = module(only.view_as(given[0])).view_as(only)[expert]
        else:
            states, picked, weights = given
            each = module(states, picked, weights * (picked == expert))
        found.append(each.reshape(-1, each.shape[-1]))
    return torch.stack(found)


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_features_of_every_expert(name):
    """The columns of an expert give what that expert adds by itself, for every token."""
    adapter, states, keywords = states_of(named(name))
    for index in sparse_layers(adapter):
        layer, layout = adapter.layer(index), adapter.layer_layout(index)
        sublayer = layout.sublayer("experts")
        given = routing(layer, sublayer, states, keywords[index])
        expected = by_expert(layer, sublayer.experts, given)
        read = states_after(layer, layout, layout.sublayer("attention"), states, keywords[index])
        features = hidden_features(layer, layout, sublayer, read, keywords[index]).flatten(0, 1)
        weight = adapter.output_weight(index, sublayer)
        parts = zip(
            features.split(sublayer.experts.width, dim=1),
            weight.split(sublayer.experts.width, dim=1),
            strict=True,
        )
        found = torch.stack([own @ columns.T for own, columns in parts])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert (expected.abs().amax(dim=(1, 2)) > 1e-3).all()


@torch.no_grad()
def test_features_against_a_plain_loop():
    """p_e act(W_gate x) * (W_up x), token by token and expert by expert."""
    adapter, states, keywords = states_of(named("mixtral"))
    layer, layout = adapter.layer(1), adapter.layer_layout(1)
    sublayer = layout.sublayer("experts")
    read = states_after(layer, layout, layout.sublayer("attention"), states, keywords[1])
    features = hidden_features(layer, layout, sublayer, read, keywords[1]).flatten(0, 1)
    normed = layer.post_attention_layernorm(read).flatten(0, 1)
    expected = torch.zeros(len(normed), 8, 40, dtype=torch.float64)
    router, gate_up = layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj
    for token, x in enumerate(normed):
        p = (router @ x).float().softmax(0).double()
        best = p.topk(2).indices.tolist()
        for expert in best:
            gate, up = (gate_up[expert] @ x).chunk(2)
            share = p[expert] / p[best].sum()
            expected[token, expert] = share * torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(features, expected.flatten(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*EXPERTS, "afmoe"])
def test_output_weight_and_back(name):
    """The tensors of an output projection are those that it was made of."""
    adapter = ModelAdapter(named(name))
    for index in sparse_layers(adapter):
        state = adapter.layer_state(index)
        for sublayer in adapter.layer_layout(index):
            again = sublayer.output_tensors(sublayer.output_weight(state))
            assert again.keys() == set(sublayer.weights)
            for tensor, value in again.items():
                assert torch.equal(value, state[tensor])


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_experts_of_two_layers(name):
    """Experts stay together with their rows of the router, in the order of their layers."""
    adapter, states, keywords = states_of(named(name))
    pair = sparse_layers(adapter)[:2]
    layout, roles = adapter.layer_layout(pair[0]), adapter.roles(pair[0])
    experts = layout.sublayer("experts")
    kept = {unit: [range(n), []] for unit, n in layout.unit_counts.items()}
    if experts.count > 1:
        kept["expert"] = [[1, 4, 6], [0, 2, 3, 5, 7]]
    layers = [fold_norms(adapter.layer_state(index), roles) for index in pair]
    merged = Concat().merge(layers, roles, [1.0, 0.0], kept)
    own = [n for n, r in roles.items() if r.sublayer == "experts" and r.part is Part.UNITS]
    each = experts.experts.count // experts.count
    places = [(0, e) for e in kept["expert"][0]] + [(1, e) for e in kept["expert"][1]]
    assert any("gate" in name or "router" in name for name in own)
    for tensor in own:
        role = roles[tensor]
        size = merged[tensor].shape[role.axis] // (experts.count * each) * each
        parts = merged[tensor].split(size, dim=role.axis)
        for part, (which, expert) in zip(parts, places, strict=True):
            source = layers[which][tensor].split(size, dim=role.axis)[expert]
            assert torch.equal(part, source), tensor
    # The order of the experts does not matter: routing is by the rows of the router.
    if experts.count > 1:
        order = {"expert": [[6, 1, 4], [7, 0, 5, 2, 3]]}
        other = dict(Concat().merge(layers, roles, [1.0, 0.0], {**kept, **order}))
        found = [
            run_layer(adapter.copy_layer(pair[0], state), states, keywords[pair[0]])
            for state in (dict(merged), other)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)  # routing is in float32


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "glm4_moe"])
@torch.no_grad()
def test_one_hot_merge_is_the_kept_layer(name):
    """All units of one of two layers, and folded norms, give that layer, in float64."""
    adapter, states, keywords = states_of(named(name))
    pair = sparse_layers(adapter)[:2]
    roles, counts = adapter.roles(pair[0]), adapter.layer_layout(pair[0]).unit_counts
    layers = [fold_norms(adapter.layer_state(index), roles) for index in pair]
    for which, index in enumerate(pair):
        kept = {u: [range(n) if i == which else [] for i in range(2)] for u, n in counts.items()}
        merged = Concat().merge(layers, roles, [float(i == which) for i in range(2)], kept)
        found = run_layer(adapter.copy_layer(index, dict(merged)), states, keywords[index])
        expected = run_layer(adapter.layer(index), states, keywords[index])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def plain_ridge(features, target, weights, start, bias, penalty):
    """Weighted ridge regression as one least-squares problem; the bias is not penalised."""
    width, root = features.shape[1], weights.sqrt()[:, None]
    left = torch.cat([features, torch.ones_like(root)], dim=1) if bias is not None else features
    prior = penalty**0.5 * torch.eye(width, left.shape[1], dtype=left.dtype)
    right = torch.cat([root * target, penalty**0.5 * start.T])
    found = torch.linalg.lstsq(torch.cat([root * left, prior]), right, driver="gelsd").solution.T
    return found[:, :width], None if bias is None else found[:, -1]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "granitemoeshared", "dbrx"])
@torch.no_grad()
def test_ridge_refit_equals_least_squares(name):
    """Layer 1 is refitted to the output of layers 1 and 2, sublayer by sublayer, in float64."""
    model, dense = named(name), ModelAdapter(named(name))
    ids = tokens(model)
    method = paper(
        operator="drop", kinds="first", groups=((1, 2),), refit="ridge", refit__lambda=0.2
    )
    compress(model, ids, method, target_layers=3, progress=False)
    found, layout = ModelAdapter(model), dense.layer_layout(1)
    states, keywords = dense.layer_inputs(ids)
    inputs = [run_layer(dense.layer(0), states, keywords[0])]
    for index in (1, 2):
        inputs.append(run_layer(dense.layer(index), inputs[-1], keywords[index]))
    output = inputs[2]
    weights = 1 / output.flatten(0, 1).square().mean(dim=1)
    layer = dense.copy_layer(1, dense.layer_state(1))

    def after(module, index, sublayer, start):
        if sublayer is None:
            return start
        return states_after(module, layout, sublayer, start, keywords[index])

    for number, sublayer in enumerate(layout):
        earlier = layout.sublayers[number - 1] if number else None
        before = after(layer, 1, earlier, inputs[0])
        read = after(layer, 1, layout.read_after(sublayer), inputs[0])
        added = output - before
        if sublayer != layout.last:
            added = sum(
                after(dense.layer(i), i, sublayer, inputs[i - 1])
                - after(dense.layer(i), i, earlier, inputs[i - 1])
                for i in (1, 2)
            )
        features = hidden_features(layer, layout, sublayer, read, keywords[1]).flatten(0, 1)
        target = added.flatten(0, 1) / sublayer.factor
        old, bias = dense.output_weight(1, sublayer), dense.layer_state(1).get(sublayer.bias)
        penalty = 0.2 * (weights[:, None] * features.square()).sum(dim=0).mean()
        weight, bias = plain_ridge(features, target, weights, old, bias, float(penalty))
        new = found.output_weight(1, sublayer)
        assert (new - old).abs().max() > 1e-3
        torch.testing.assert_close(new, weight, rtol=1e-4, atol=1e-6)
        tensors = sublayer.output_tensors(new)
        tensors |= {} if bias is None else {sublayer.bias: bias}
        dense.assign(layer, {tensor: value.contiguous() for tensor, value in tensors.items()})


@pytest.mark.parametrize("name", slowly(ALL_PICKED, ("gpt_oss", "llama4_text")))
def test_scores_that_need_gradients(name):
    """Gradients are the model's; attributions of all channels add up to the change of the loss.

    All experts are picked, because the loss jumps where a token's experts change.
    """
    model = named(name, **ALL_PICKED[name])
    ids, adapter = tokens(model, 4), ModelAdapter(model)
    layers = range(adapter.num_layers)
    with LayerStream(adapter, ids, batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1)
        with torch.no_grad():
            path = path_gradients(stream, layers, steps=40)
        weight = weight_gradients(stream, layers)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    whole = model(ids, labels=ids).loss
    whole.backward()
    for index in layers:
        for sublayer in adapter.layer_layout(index):
            layer = adapter.layer(index)
            gradients = {tensor: layer.get_parameter(tensor).grad for tensor in sublayer.weights}
            expected = sublayer.output_weight(gradients)
            found = weight[index, sublayer.unit]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    silent = named(name, **ALL_PICKED[name])
    with torch.no_grad():
        other = ModelAdapter(silent)
        for index in layers:
            for sublayer in other.layer_layout(index):
                zeros = torch.zeros_like(other.output_weight(index, sublayer))
                tensors = sublayer.output_tensors(zeros)
                other.write(index, {**other.layer_state(index), **tensors})
        nothing = silent(ids, labels=ids).loss
    total = sum(values.sum() for values in path.values())
    assert total.item() == pytest.approx((whole - nothing).item(), rel=0.05)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in silent.named_parameters()}


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe", "dbrx", "afmoe"])
@torch.no_grad()
def test_moments_are_those_of_the_features(name):
    """Statistics of one pass see the features of experts and of shared experts."""
    model = named(name)
    adapter, ids = ModelAdapter(model), tokens(model)
    states, keywords = adapter.layer_inputs(ids)
    collector = StatisticsCollector(adapter, ("abs", "square", "mean"))
    with LayerStream(adapter, ids, batch_size=len(ids), progress=False) as stream:
        stream.embed()
        stream.advance(0, adapter.num_layers - 1, collector)
    for index in range(adapter.num_layers):
        layer, layout = adapter.layer(index), adapter.layer_layout(index)
        for sublayer in layout:
            source = layout.read_after(sublayer)
            read = (
                states_after(layer, layout, source, states, keywords[index]) if source else states
            )
            features = hidden_features(layer, layout, sublayer, read, keywords[index])
            moments = collector.found[index].moments[sublayer.unit]
            mean = features.flatten(0, 1).abs().mean(dim=0)
            torch.testing.assert_close(moments.mean("abs"), mean, rtol=1e-6, atol=1e-9)
        states = run_layer(layer, states, keywords[index])


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoeshared", "glm4_moe"])
def test_derivative_of_a_shared_expert(name):
    """A small change of an input projection changes the features by D times its effect."""
    adapter, states, keywords = states_of(named(name))
    layer, layout = adapter.layer(1), adapter.layer_layout(1)
    sublayer = layout.last
    assert len(sublayer.gates) == 2
    for gate in sublayer.gates:
        read, slopes, before = activation_derivative(
            layer, layout, sublayer, states, keywords[1], gate
        )
        weight = layer.get_parameter(f"{gate.name}.weight")
        change = 1e-6 * torch.randn_like(gate.rows(weight, sublayer.count))
        with torch.no_grad():
            gate.rows(weight, sublayer.count).add_(change)
            after = hidden_features(layer, layout, sublayer, states, keywords[1])
            gate.rows(weight, sublayer.count).sub_(change)
        expected = slopes * (read @ change.T)
        torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-9)
        assert expected.abs().max() > 1e-7


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "dbrx"])
def test_refit_brings_the_merge_closer(name):
    """After a merge of two layers with experts, the output is closer to the dense model's."""
    errors = []
    for refit, others in {"none": {}, "ridge": {}, "gauss_newton": {"refit__align": None}}.items():
        model = named(name)
        ids = tokens(model, 16)
        with torch.no_grad():
            dense = model.model(ids) if hasattr(model, "model") else model.transformer(ids)
            method = paper(groups=((1, 2),), kinds="first", norms="fold", refit=refit, **others)
            compress(model, ids, method, target_layers=3, progress=False)
            merged = model.model(ids) if hasattr(model, "model") else model.transformer(ids)
        gap = merged.last_hidden_state - dense.last_hidden_state
        errors.append(gap.square().sum().item())
    assert errors[1] < 0.9 * errors[0]
    shared = len(ModelAdapter(named(name)).layer_layout(1).of("ffn")) > 1
    assert errors[2] < errors[1] if shared else errors[2] == errors[1]


CHOICES = [
    {"retention": "adaptive"},
    {"retention": "leverage"},
    {"sensitivity": "taylor"},
    {"sensitivity": "path_attribution"},
    {"sensitivity": "wanda"},
    {"sensitivity": "reap"},
    {"operator": "average"},
    {"operator": "laco"},
    {"operator": "drop", "selection": "taylor"},
    {"operator": "drop", "selection": "magnitude", "refit": "replaceme"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_components_on_experts(choice, name):
    """Every kind of component runs on layers with experts."""
    model = named(name)
    method = paper(kinds="first", protect_first=1, **choice)
    plan = compress(model, tokens(model), method, target_layers=3, progress=False)
    assert plan.num_layers == 3
    with torch.no_grad():
        assert model(tokens(model)).logits.isfinite().all()
