"""Every supported decoder type on a small random model: its description, merging and saving."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.merge.loop import compress
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.models.adapter import ModelAdapter
from come.models.families import FAMILIES
from come.models.layout import Part
from come.models.sublayers import hidden_features, run_layer, states_after
from tests.decoders import DECODERS, pico_decoder
from tests.methods import come_plus, paper

TYPES = [model_type for model_type in FAMILIES if model_type in DECODERS]
OFTEN = {"llama", "opt"}
"""Merged in the fast tests; the others in the slow ones."""


def tokens(model, windows=4, seq=20):
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocabulary, (windows, seq), generator=generator)


def generated(model, use_cache):
    prompt = tokens(model, 2, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **options
    )


def pairs_of_a_kind(adapter):
    """For every kind of layer, the first two of the kind."""
    places = {}
    for index, layout in enumerate(adapter.layout.layers):
        places.setdefault(layout, []).append(index)
    return [tuple(found[:2]) for found in places.values() if len(found) > 1]


def mergeable_decoder(model_type):
    """A model in which two adjacent layers can be merged, and whether they must be of a kind."""
    for layers in (4, 6):
        model = pico_decoder(model_type, layers)
        if any(a == b for a, b in pairwise(ModelAdapter(model).layout.layers)):
            return model, "same"
    return model, "first"


def shapes_of(layer):
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_replay(model_type):
    """The layers one after another, with recorded arguments, give what the final norm reads."""
    model = pico_decoder(model_type)
    adapter, ids, seen = ModelAdapter(model), tokens(model), []
    hook = adapter.final_norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(ids, use_cache=False)
    hook.remove()
    states, keywords = adapter.layer_inputs(ids)
    for index in range(adapter.num_layers):
        states = run_layer(adapter.layer(index), states, keywords[index])
    assert torch.equal(states, seen[-1].view(states.shape))


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_sublayers_add_up(model_type):
    """Each sublayer adds its factor times the normed output projection of its features."""
    model = pico_decoder(model_type)
    adapter = ModelAdapter(model)
    states, keywords = adapter.layer_inputs(tokens(model))
    for index in range(adapter.num_layers):
        layer, layout = adapter.layer(index), adapter.layer_layout(index)
        after = {None: states}
        before = states
        for sublayer in layout:
            after[sublayer] = states_after(layer, layout, sublayer, states, keywords[index])
            read = after[layout.read_after(sublayer)]
            features = hidden_features(layer, layout, sublayer, read, keywords[index])
            assert features.shape[-1] == sublayer.width
            added = features @ adapter.output_weight(index, sublayer).T
            bias = adapter.layer_state(index).get(sublayer.bias)
            added = added if bias is None else added + bias
            if sublayer.post_norm:
                added = layer.get_submodule(sublayer.post_norm.module)(added)
            expected = before + sublayer.factor * added
            torch.testing.assert_close(after[sublayer], expected, rtol=1e-4, atol=1e-5)
            assert (after[sublayer] - before).abs().max() > 1e-3, f"{sublayer.name} adds nothing"
            before = after[sublayer]
        states = run_layer(layer, states, keywords[index])
        assert torch.equal(before, states)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_one_layer_is_kept(model_type):
    """With all units of one layer and folded norms, the merged layer is that layer."""
    model = pico_decoder(model_type)
    adapter = ModelAdapter(model)
    _, keywords = adapter.layer_inputs(tokens(model))
    states = torch.randn(4, 20, adapter.config.hidden_size, generator=torch.Generator())
    pairs = pairs_of_a_kind(adapter)
    assert pairs, "no two layers of a kind"
    for pair in pairs:
        roles, counts = adapter.roles(pair[0]), adapter.layer_layout(pair[0]).unit_counts
        folded = [fold_norms(adapter.layer_state(index), roles) for index in pair]
        for which, index in enumerate(pair):
            kept = {
                u: [range(n) if i == which else [] for i in range(2)] for u, n in counts.items()
            }
            shares = [float(i == which) for i in range(2)]
            merged = dict(Concat().merge(folded, roles, shares, kept))
            merged |= {
                name: folded[which][name]  # averaged, as it cannot be folded into rows without bias
                for name, role in roles.items()
                if role.part is Part.NORM and name.endswith(".bias")
            }
            found = run_layer(adapter.copy_layer(index, merged), states, keywords[index])
            expected = run_layer(adapter.layer(index), states, keywords[index])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model_type",
    [t if t in OFTEN else pytest.param(t, marks=pytest.mark.slow) for t in TYPES],
)
@pytest.mark.parametrize("method", [paper, come_plus])
def test_merge_and_reload(model_type, method, tmp_path):
    """A merge of two layers keeps all shapes, loads in transformers, and generates."""
    model, kinds = mergeable_decoder(model_type)
    shapes = [shapes_of(layer) for layer in ModelAdapter(model).layers]
    layers, chosen = len(shapes), method(kinds=kinds)
    plan = compress(
        model, tokens(model, 8), chosen, target_layers=layers - 1, batch_size=4, progress=False
    )
    adapter, first = ModelAdapter(model), plan.steps[0].first
    assert adapter.num_layers == plan.num_layers == layers - 1
    assert shapes_of(adapter.layers[first]) == shapes[first]
    check_saved(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dropped", [1, 2])
def test_drop_and_reload(model_type, dropped, tmp_path):
    """Every layer can be dropped, also one of another kind than its neighbours."""
    model = pico_decoder(model_type)
    adapter = ModelAdapter(model)
    slot = dropped % 2
    adapter.replace(1, 2, adapter.layer_state(1 + slot), slot)
    check_saved(model, tmp_path)


def check_saved(model, folder):
    """The saved model gives the same logits when loaded again, and generates with its cache."""
    ids = tokens(model)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    assert logits.isfinite().all()
    assert torch.equal(generated(model, True), generated(model, False))
    model.save_pretrained(folder)
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, use_cache=False).logits, logits)
