"""Layers as data: units of fused tensors, roles, sublayers run alone, and recorded arguments."""

import ast

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from come.merge.alignment import fold_by_layer, fold_input_transform
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.models.adapter import ModelAdapter
from come.models.families import FAMILIES
from come.models.families.parts import same_layers
from come.models.layout import LayerLayout, Norm, Part, Role, Rows, Sublayer
from come.models.sublayers import hidden_features, run_layer, states_after
from tests.commands import ROOT
from tests.conftest import pico

HIDDEN, GROUPS = 6, 3
SIZES = {"q": 4, "k": 2, "v": 2}  # rows of a KV group
KEPT = {"kv_group": [[0, 2], [1]]}


def attention(*inputs, axis=0):
    """A layer that consists of attention; axis 1: its output projection is stored as [in, out]."""
    names, norm = ("attention", "attention", "kv_group"), Norm("norm")
    options = {"columns": SIZES["q"], "output_axis": 1 - axis}
    return LayerLayout((Sublayer(*names, GROUPS, norm, inputs, "out", **options),))


def separate(seed):
    """The tensors of a layer with separate projections of queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm": (HIDDEN,), "out": (HIDDEN, GROUPS * SIZES["q"])}
    shapes |= {name: (GROUPS * size, HIDDEN) for name, size in SIZES.items()}
    found = {f"{name}.weight": torch.randn(s, generator=generator) for name, s in shapes.items()}
    return found | {f"{n}.bias": torch.randn(s[0], generator=generator) for n, s in shapes.items()}


def fused(state, axis):
    """The same layer with one projection for all three; axis 1: weights stored as [in, out]."""
    found = {name: tensor for name, tensor in state.items() if name[0] not in SIZES}
    for kind in ("weight", "bias"):
        found[f"qkv.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in SIZES])
    if axis == 1:
        found |= {f"{n}.weight": found[f"{n}.weight"].T.contiguous() for n in ("qkv", "out")}
    return found


def fused_layers(axis):
    """Two fused layers, the sublayer of each, and the roles of their tensors."""
    states = [fused(separate(seed), axis) for seed in (0, 1)]
    layout = attention(Rows("qkv", tuple(SIZES.values()), axis), axis=axis)
    return states, layout.last, layout.roles(states[0])


def test_units_of_a_tensor_with_several_blocks():
    role = Role(Part.UNITS, "attention", "kv_group", sizes=(4, 2, 2))
    queries, keys, values = (block.tolist() for block in role.indices(3, [0, 2]))
    assert queries == [0, 1, 2, 3, 8, 9, 10, 11]
    assert keys == [12, 13, 16, 17]
    assert values == [18, 19, 22, 23]
    assert role.count(torch.zeros(24, HIDDEN)) == 3


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fold", [lambda state, roles: state, fold_norms])
def test_fused_tensors_are_merged_like_separate_ones(axis, fold):
    layers = [separate(seed) for seed in (0, 1)]
    own = attention(*(Rows(name, (size,)) for name, size in SIZES.items())).roles(layers[0])
    states, _, roles = fused_layers(axis)
    merged = Concat().merge([fold(layer, own) for layer in layers], own, [0.6, 0.4], KEPT)
    found = Concat().merge([fold(state, roles) for state in states], roles, [0.6, 0.4], KEPT)
    expected = fused(dict(merged), axis)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_norms_are_folded_into_tensors_that_are_not_of_a_module():
    state = {"rows": separate(0)["q.weight"], "norm.weight": separate(0)["norm.weight"]}
    folded = fold_norms(state, attention(Rows("rows", (4,))).roles(state))
    assert torch.equal(folded["norm.weight"], torch.ones(HIDDEN))
    torch.testing.assert_close(folded["rows"], state["rows"] * state["norm.weight"])


@pytest.mark.parametrize("axis", [0, 1])
def test_input_transforms_of_a_fused_tensor(axis):
    """The rows of each layer's units get that layer's map; nothing else changes."""
    layers, sublayer, roles = fused_layers(axis)
    maps = [*torch.randn(2, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))]
    by_hand = [
        {**x, "qkv.weight": x["qkv.weight"] @ p if axis == 0 else p.T @ x["qkv.weight"]}
        for x, p in zip(layers, maps)
    ]
    for layer, change, expected in zip(layers, maps, by_hand):
        found = fold_input_transform(roles, sublayer, layer, change)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)
    merged = dict(Concat().merge(layers, roles, [0.6, 0.4], KEPT))
    before = merged["qkv.weight"].clone()
    found = fold_by_layer(roles, sublayer, KEPT["kv_group"], merged, maps)
    expected = Concat().merge(by_hand, roles, [0.6, 0.4], KEPT)["qkv.weight"]
    assert found.keys() == {"qkv.weight"}
    torch.testing.assert_close(found["qkv.weight"], expected)
    assert torch.equal(merged["qkv.weight"], before)


@torch.no_grad()
def test_each_sublayer_adds_its_output_to_the_residual_stream(family, windows):
    adapter = ModelAdapter(pico(family))
    layer, layout = adapter.layers[1], adapter.layer_layout(1)
    states, keywords = adapter.layer_inputs(windows)
    after = {None: states}
    for sublayer in layout:
        before = after[next((s.name for s in reversed(layout.before(sublayer))), None)]
        read = after[getattr(layout.read_after(sublayer), "name", None)]
        features = hidden_features(layer, layout, sublayer, read, keywords[1])
        assert features.shape == (*windows.shape, sublayer.width)
        added = layer.get_submodule(sublayer.output)(features)
        if sublayer.post_norm:
            added = layer.get_submodule(sublayer.post_norm.module)(added)
        after[sublayer.name] = states_after(layer, layout, sublayer, states, keywords[1])
        torch.testing.assert_close(after[sublayer.name], before + sublayer.factor * added)
    assert torch.equal(after[layout.last.name], run_layer(layer, states, keywords[1]))
    assert not any("forward" in vars(module) for module in layer.modules())


@pytest.mark.parametrize(
    "name",
    ["gate.weight", "self_attn.sinks", "self_attn.inner.q_proj.weight"]
    + [f"self_attn.{x}_proj.{y}" for x in "qo" for y in ("weight_scale", "lora_A.weight")],
)
def test_unknown_tensors_are_refused(name):
    adapter = ModelAdapter(pico("qwen3_gqa"))
    tensors = [*adapter.layer_state(0), "self_attn.q_norm.inner.scale"]
    roles = adapter.layer_layout(0).roles(tensors)
    assert roles["self_attn.q_norm.inner.scale"].part is Part.SHARED
    with pytest.raises(ValueError, match=f"layer tensor '{name}' is not known"):
        adapter.layer_layout(0).roles([*tensors, name])


class Layer(nn.Module):
    """A layer that returns three values."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))

    def forward(self, states, mask, layer_past=None, *, scale=1.0, **others):
        return states + scale * self.down(self.up(states) * mask) + others["shift"], None, None


class Model(nn.Module):
    """A model that calls its layers with positional arguments."""

    def __init__(self, config):
        super().__init__()
        self.config, self.embeddings = config, nn.Embedding(9, HIDDEN)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, use_cache):
        states = self.embeddings(input_ids)
        for number, block in enumerate(self.blocks):
            mask, cache = input_ids[..., None] + number, [number]
            states, _, _ = block(states, mask, cache, scale=2.0, shift=number, use_cache=use_cache)
        return states


@torch.no_grad()
def test_layer_inputs_of_positional_arguments_and_tuples(monkeypatch):
    mlp = Sublayer("ffn", "ffn", "channel", HIDDEN, None, (Rows("up"),), "down")
    layout = {"stack": "blocks", "returns": 3}
    monkeypatch.setitem(FAMILIES, "three", lambda config: same_layers(config, mlp, **layout))
    config = PretrainedConfig(num_hidden_layers=3)
    config.model_type = "three"
    model, tokens = Model(config), torch.tensor([[1, 2, 3], [4, 5, 6]])
    adapter = ModelAdapter(model)
    states, keywords = adapter.layer_inputs(tokens)
    assert torch.equal(states, model.embeddings(tokens))
    assert [set(given) for given in keywords] == [{"mask", "scale", "shift"}] * 3
    for layer, given in zip(adapter.layers, keywords):
        states = run_layer(layer, states, given)
    assert torch.equal(states, model(tokens, use_cache=False))


def test_algorithms_name_no_family():
    """Names of families, and of modules of their layers, stand in come/models/families alone."""
    known = {name for name in FAMILIES if len(name) > 3} | {"self_attn", "mlp", "input_layernorm"}
    for package in ("merge", "linalg", "statistics", "stream", "distill"):
        for path in (ROOT / "come" / package).rglob("*.py"):
            strings = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            code = [text for text in strings if " " not in text]  # not documentation
            assert not known & {word for text in code for word in (text, *text.split("."))}, path
            assert "come.models.families" not in path.read_text(), path
