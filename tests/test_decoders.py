"""Every supported decoder type on a small random model: its description, merging and saving."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from come.merge.loop import compress
from come.merge.norms import fold_norms, folded_roles
from come.merge.operators.concat import Concat
from come.models.adapter import ModelAdapter
from come.models.families import FAMILIES
from come.models.layout import Part
from come.models.loading import load_weights
from come.models.sublayers import hidden_features, run_layer, states_after
from tests.decoders import DECODERS, VARIANTS, pico_decoder
from tests.methods import come_plus, paper
from tests.reload_decoders import sequences

TYPES = [*(t for t in FAMILIES if t in DECODERS), *VARIANTS]
OFTEN = {
    *("llama", "opt", "qwen3", "gemma", "granite", "smollm3", "olmo", "starcoder2", "apertus"),
    *("phi3", "gpt2", "gpt_neox", "falcon", "bloom", "codegen", "cohere", "recurrent_gemma"),
    *(
        "gemma3_text",
        "gemma4_unified_text",
        "glm4",
        "olmo2",
        "exaone4",
        "afmoe",
        "mixtral",
        "qwen2_moe",
        "gpt_oss",
    ),
    *("llama4_text", "granitemoeshared", "glm4_moe", "deepseek_v2", "minicpm3", "kimi_linear"),
    *("mamba", "mamba2", "bamba", "falcon_h1", "qwen3_5_text", "lfm2", "nemotron_h", "xlstm"),
    "rwkv",
}
"""In the fast tests, one for each kind of layer; the others in the slow ones."""
MERGED_OFTEN = {"llama", "gemma3_text", "gemma4_unified_text", "mixtral", "mamba2"}
EACH = [t if t in OFTEN else pytest.param(t, marks=pytest.mark.slow) for t in TYPES]

RENAMED = {
    *("bailing_hybrid-dense", "fuyu", "gemma3", "gemma4_unified", "got_ocr2", "gpt_neox"),
    *(
        "gpt_neox-serial",
        "kimi_linear-dense",
        "lfm3",
        "lfm3-biases",
        "nemotron_h-dense",
        "olmo_hybrid",
    ),
    "olmo_hybrid-biases",
}
"""Types whose tensors have other names in checkpoints; they cannot be read layer by layer."""


def tokens(model, windows=4, seq=20):
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocabulary, (windows, seq), generator=generator)


def generated(model, use_cache):
    prompt = tokens(model, sequences(model), 12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **options
    )


def pairs_of_a_kind(adapter):
    """Each layer with the next one of its kind."""
    layouts = adapter.layout.layers
    later = [
        [j for j in range(i + 1, len(layouts)) if layouts[j] == a] for i, a in enumerate(layouts)
    ]
    return [(i, found[0]) for i, found in enumerate(later) if found]


def mergeable_decoder(model_type):
    """A model in which two adjacent layers can be merged, and whether they must be of a kind."""
    for layers in (4, 6):
        model = pico_decoder(model_type, layers)
        if any(a == b for a, b in pairwise(ModelAdapter(model).layout.layers)):
            return model, "same"
    return model, "first"


def shapes_of(layer):
    return {name: tensor.shape for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("model_type", EACH)
@torch.no_grad()
def test_replay(model_type):
    """The layers one after another, with recorded arguments, give the model's logits."""
    model = pico_decoder(model_type)
    adapter, ids, seen = ModelAdapter(model), tokens(model), []
    hook = adapter.final_norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    logits = model(ids, use_cache=False).logits
    hook.remove()
    states, keywords = adapter.layer_inputs(ids)
    for index in range(adapter.num_layers):
        states = run_layer(adapter.layer(index), states, keywords[index])
    assert torch.equal(states, seen[-1].view(states.shape))
    torch.testing.assert_close(adapter.head(adapter.final_norm(states)), logits)


def channel_gate(layer, layout, sublayer, states, keywords):
    """What multiplies the channels of a sublayer's output, relative to the mean over them."""
    if not sublayer.channel_gate:
        return 1.0
    seen = []
    gate = layer.get_submodule(sublayer.channel_gate)
    hook = gate.register_forward_hook(lambda module, inputs, output: seen.append(output.sigmoid()))
    hidden_features(layer, layout, sublayer, states, keywords)
    hook.remove()
    return seen[0] / seen[0].mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("model_type", EACH)
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
            added = added * channel_gate(layer, layout, sublayer, read, keywords[index])
            if sublayer.post_norm:
                added = layer.get_submodule(sublayer.post_norm.module)(added)
            expected = before + sublayer.factor * added
            torch.testing.assert_close(after[sublayer], expected, rtol=1e-4, atol=1e-5)
            assert (after[sublayer] - before).abs().max() > 1e-3, f"{sublayer.name} adds nothing"
            before = after[sublayer]
        scale = adapter.scale(index)
        states = run_layer(layer, states, keywords[index])
        assert torch.equal(before if scale is None else before * scale, states)


@pytest.mark.parametrize("model_type", EACH)
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
            merged = dict(Concat().merge(folded, folded_roles(roles), shares, kept))
            found = run_layer(adapter.copy_layer(index, merged), states, keywords[index])
            expected = run_layer(adapter.layer(index), states, keywords[index])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", EACH)
@torch.no_grad()
def test_units_are_independent(model_type):
    """Units of two layers give the same features in their merged layer as in their own."""
    adapter = ModelAdapter(pico_decoder(model_type))
    _, keywords = adapter.layer_inputs(tokens(adapter.model))
    states = torch.randn(4, 20, adapter.config.hidden_size, generator=torch.Generator())
    for pair in pairs_of_a_kind(adapter):
        layout, roles = adapter.layer_layout(pair[0]), adapter.roles(pair[0])
        first, second = (adapter.layer_state(index) for index in pair)
        common = {name: first[name] for name in first if roles[name].part is not Part.UNITS}
        sources = [fold_norms(state | common, roles) for state in (first, second)]
        kept = {u: [range(1, n, 2), range(0, n, 2)] for u, n in layout.unit_counts.items()}
        merged = Concat().merge(sources, folded_roles(roles), [0.5, 0.5], kept)
        copies = [adapter.copy_layer(pair[0], dict(state)) for state in (*sources, merged)]
        for sublayer in layout:
            *own, found = (
                hidden_features(layer, layout, sublayer, states, keywords[pair[0]]).unflatten(
                    -1, (sublayer.count, sublayer.columns)
                )
                for layer in copies
            )
            chosen = [f[:, :, list(units)] for f, units in zip(own, kept[sublayer.unit])]
            expected = torch.cat(chosen, dim=2)
            if sublayer.experts and sublayer.count > 1:  # routing weights depend on the others
                both = found.any(dim=-1) & expected.any(dim=-1)
                assert both.flatten(0, 1).any(dim=0).sum() > sublayer.count / 2
                found, expected = (normalize(f[both], dim=-1) for f in (found, expected))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", EACH)
@torch.no_grad()
def test_gates(model_type):
    """A row of an input projection changes one hidden activation."""
    adapter = ModelAdapter(pico_decoder(model_type))
    states, keywords = adapter.layer_inputs(tokens(adapter.model))
    layer, layout = adapter.layer(0), adapter.layer_layout(0)
    for sublayer in layout:
        before = hidden_features(layer, layout, sublayer, states, keywords[0])
        for gate in sublayer.gates:
            weight = layer.get_parameter(f"{gate.name}.weight")
            rows = gate.rows(weight, sublayer.count)
            rows[3] *= 2
            after = hidden_features(layer, layout, sublayer, states, keywords[0])
            rows[3] /= 2
            differing = (after - before).abs().flatten(0, 1).amax(dim=0) > 1e-3
            assert differing.nonzero().flatten().tolist() == [3], gate


@pytest.mark.parametrize(
    "model_type",
    [t if t in MERGED_OFTEN else pytest.param(t, marks=pytest.mark.slow) for t in TYPES],
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
    last = plan.steps[0].last
    merged = shapes_of(adapter.layers[first]).items()
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
    """A saved model gives the same logits with its layers in memory and on disk."""
    model = pico_decoder(model_type)
    model.save_pretrained(tmp_path)
    ids = tokens(model)
    routed = any(layout.routed for layout in ModelAdapter(model).layout.layers)
    expected = model(ids, use_cache=False).logits
    loaded = load_weights(tmp_path, device="cpu")
    assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    if model_type in RENAMED or routed:
        said = "experts one by one" if routed else "do not fit its configuration"
        with pytest.raises(ValueError, match=said):
            load_weights(tmp_path, device="cpu", weights="disk")
        return
    loaded = load_weights(tmp_path, device="cpu", weights="disk")
    assert torch.equal(loaded(ids, use_cache=False).logits, expected)


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
        found = again.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)  # memory is aligned differently
