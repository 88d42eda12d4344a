"""Every supported decoder type on a small random model: its description, merging and saving."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.merge.loop import compress
from come.merge.norms import fold_norms
from come.merge.operators.concat import Concat
from come.models.adapter import ModelAdapter
from come.models.families import FAMILIES, MIXERS
from come.models.families.mixers import layers_of
from come.models.families.parts import ffn
from come.models.layout import Norm, Part
from come.models.loading import load_weights
from come.models.sublayers import hidden_features, run_layer, states_after
from tests.decoder_configs import VARIANTS
from tests.decoders import DECODERS, pico_decoder, type_of
from tests.methods import come_plus, paper

UNSUPPORTED_FORMS = {"granitemoehybrid", "nemotron_h"}
"""Types whose usual form has experts, of which only a dense form is supported."""
TYPES = [
    name
    for name in DECODERS
    if (type_of(name) in FAMILIES and name not in UNSUPPORTED_FORMS)
    or (type_of(name) in MIXERS and name in VARIANTS)
]
RENAMED = {"bailing_hybrid", "gemma3", "kimi_linear", "lfm3", "nemotron_h", "olmo_hybrid"}
"""Types whose checkpoints have other names than the modules."""
OFTEN = {"llama", "opt"}
"""Merged in the fast tests; the others in the slow ones."""


@pytest.fixture(autouse=True)
def dense_forms(monkeypatch):
    """Types with experts, for models all of whose layers have a dense MLP instead."""

    def dense(config, mixers):
        offset = mixers(config)[0].norm.offset
        mlp = ffn(config.intermediate_size, norm=Norm("post_attention_layernorm", offset))
        kinds = getattr(config, "layer_types", None) or ()
        return layers_of([(mixer, mlp) for mixer in mixers(config)], kinds)

    for model_type in MIXERS.keys() - FAMILIES.keys():
        monkeypatch.setitem(FAMILIES, model_type, partial(dense, mixers=MIXERS[model_type]))


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


def parameter_shapes(layer):
    return {name: p.shape for name, p in layer.named_parameters()}


def pairs_of_a_kind(adapter):
    layouts = adapter.layout.layers
    return [(i, i + 1) for i, (a, b) in enumerate(pairwise(layouts)) if a == b]


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_replay(model_type):
    """The layers one after another, with recorded arguments, then norm and head: the logits."""
    model = pico_decoder(model_type)
    adapter, ids = ModelAdapter(model), tokens(model)
    states, keywords = adapter.layer_inputs(ids)
    for index in range(adapter.num_layers):
        states = run_layer(adapter.layer(index), states, keywords[index])
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(
        adapter.head(adapter.final_norm(states)), logits, rtol=1e-5, atol=1e-5
    )


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
            module = layer.get_submodule(sublayer.output)
            added = features @ adapter.output_weight(index, sublayer).T
            bias = getattr(module, "bias", None)
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
    assert pairs, "no two adjacent layers of a kind"
    for pair in pairs:
        roles, counts = adapter.roles(pair[0]), adapter.layer_layout(pair[0]).unit_counts
        folded = [fold_norms(adapter.layer_state(index), roles) for index in pair]
        for which, index in enumerate(pair):
            kept = {
                u: [range(n) if i == which else [] for i in range(2)] for u, n in counts.items()
            }
            shares = [float(i == which) for i in range(2)]
            merged = dict(Concat().merge(folded, roles, shares, kept))
            found = run_layer(adapter.copy_layer(index, merged), states, keywords[index])
            expected = run_layer(adapter.layer(index), states, keywords[index])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_units_are_independent(model_type):
    """Units of two layers, side by side in one, compute what they compute in their layers."""
    model = pico_decoder(model_type)
    adapter = ModelAdapter(model)
    _, keywords = adapter.layer_inputs(tokens(model))
    states = torch.randn(4, 20, adapter.config.hidden_size, generator=torch.Generator())
    for pair in pairs_of_a_kind(adapter):
        layout, roles = adapter.layer_layout(pair[0]), adapter.roles(pair[0])
        first, second = (dict(fold_norms(adapter.layer_state(index), roles)) for index in pair)
        second |= {name: first[name] for name in roles if roles[name].part is Part.SHARED}
        kept = {u: [range(0, n, 2), range(1, n, 2)] for u, n in layout.unit_counts.items()}
        merged = dict(Concat().merge([first, second], roles, [1.0, 0.0], kept))
        run = partial(hidden_features, states=states, keywords=keywords[pair[0]])
        for sublayer in layout:
            parts = []
            for state, units in zip([first, second], kept[sublayer.unit], strict=True):
                features = run(adapter.copy_layer(pair[0], state), layout, sublayer)
                columns = torch.arange(sublayer.width).view(sublayer.count, -1)[list(units)]
                parts.append(features[..., columns.flatten()])
            found = run(adapter.copy_layer(pair[0], merged), layout, sublayer)
            torch.testing.assert_close(found, torch.cat(parts, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model_type",
    [t if t in OFTEN else pytest.param(t, marks=pytest.mark.slow) for t in TYPES],
)
@pytest.mark.parametrize("method", [paper, come_plus])
def test_merge_and_reload(model_type, method, tmp_path):
    """A merge of two layers keeps all shapes, loads in transformers, and generates."""
    model = pico_decoder(model_type)
    shapes = [parameter_shapes(layer) for layer in ModelAdapter(model).layers]
    layers = len(shapes)
    plan = compress(
        model, tokens(model, 8), method(), target_layers=layers - 1, batch_size=4, progress=False
    )
    adapter = ModelAdapter(model)
    assert adapter.num_layers == plan.num_layers == layers - 1
    first, last = plan.steps[0].first, plan.steps[0].last
    merged = parameter_shapes(adapter.layers[first]).items()
    assert any(merged >= own.items() for own in shapes[first : last + 1])
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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_layers_on_disk(model_type, tmp_path):
    """With its layers on disk, the model gives the same logits, or says that it cannot be read."""
    model = pico_decoder(model_type)
    model.save_pretrained(tmp_path)
    options = {"dtype": "float32", "device": "cpu", "scratch": tmp_path}
    if type_of(model_type) in RENAMED:
        with pytest.raises(ValueError, match="under other names"):
            load_weights(tmp_path, weights="disk", **options)
        return
    again = load_weights(tmp_path, weights="disk", **options)
    ids = tokens(model)
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_last_attention():
    """The only layer with attention cannot be dropped from a model with several kinds of layer."""
    model = pico_decoder("lfm2", full_attn_idxs=[2])
    adapter = ModelAdapter(model)
    before = adapter.layer_state(1)["ffn_norm.weight"].clone()
    with pytest.raises(ValueError, match="removing layers 2 leaves no layer with attention"):
        adapter.replace(1, 2, adapter.zeroed(1, "ffn"))
    assert torch.equal(adapter.layer_state(1)["ffn_norm.weight"], before)
    adapter.replace(1, 2, adapter.layer_state(2), slot=1)
    assert adapter.config.layer_types == ["conv", "full_attention", "conv"]


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
