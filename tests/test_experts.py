"""Mixtures of experts: features, merging, refits and scores of experts and of shared experts."""

import pytest
import torch

from come.merge.loop import compress
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.merge.sensitivity.base import SENSITIVITY
from come.models.adapter import ModelAdapter
from come.models.families import REFUSED, check_model_type, layout_of
from come.models.layout import Part
from come.models.sublayers import hidden_features, run_layer, states_after
from tests.decoders import DECODERS, pico_decoder
from tests.methods import come_plus, paper

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


def named(name, layers=4, dtype=torch.float64):
    model = pico_decoder(name.split()[0], layers, **EXPERTS[name]).to(dtype)
    model.config._experts_implementation = "eager"  # the others compute in float32 at most
    return model


def tokens(model, windows=6, seq=20):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (windows, seq), generator=generator)


def states_of(model, dtype=torch.float64):
    adapter, ids = ModelAdapter(model), tokens(model)
    states, keywords = adapter.layer_inputs(ids)
    return adapter, states.to(dtype), keywords


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
        read = states_after(
            layer, layout, layout.sublayer("attention"), states, keywords[index]
        )
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


@pytest.mark.parametrize("name", EXPERTS)
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
