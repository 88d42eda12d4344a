"""RWKV: the norm of the embeddings, rescaled states, the gated projection, and its caches."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.data.sampling import Sampling, sample
from come.evaluate.speed import compare_speed
from come.merge.loop import compress
from come.merge.saving import check_cache
from come.models.adapter import ModelAdapter
from come.models.families import layout_of
from come.models.sublayers import run_layer
from come.models.weights import save_weights
from come.stream.stream import LayerStream
from tests.decoders import DECODERS, pico_decoder
from tests.disk import on_disk
from tests.methods import come_plus, recipe, span_of
from tests.test_decoders import check_saved, tokens

NORM = "rwkv.blocks.0.pre_ln.weight"


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("has_run", [False, True])
@torch.no_grad()
def test_states_are_no_longer_halved(every, has_run):
    """The logits, names and weights of a model stay, also if it has halved its weights before."""
    model = pico_decoder("rwkv", rescale_every=every)
    for module in model.modules():  # halved states make the norms' epsilon four times as large
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12
    names = set(model.state_dict())
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    own = copy.deepcopy(model)(tokens(model), use_cache=False).logits
    if has_run:
        model(tokens(model), use_cache=False)
        halved = model.rwkv.blocks[3].attention.output.weight
        assert torch.equal(halved, weights["rwkv.blocks.3.attention.output.weight"]) == (not every)
    for _ in range(2):  # the second one changes nothing
        ModelAdapter(model)
    found = model(tokens(model), use_cache=False).logits
    torch.testing.assert_close(found, own)
    assert model.config.rescale_every == 0
    stored = model.state_dict()
    assert set(stored) == names
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def test_first_layer_can_be_dropped(tmp_path):
    """The norm of the embeddings stays, and does not belong to the first layer."""
    model = pico_decoder("rwkv")
    norm, embeddings = copy.deepcopy(model.rwkv.blocks[0].pre_ln), model.rwkv.embeddings.weight
    adapter, ids = ModelAdapter(model), tokens(model)
    states, keywords = adapter.layer_inputs(ids)
    assert torch.equal(states, norm(embeddings[ids]))
    assert "pre_ln.weight" not in adapter.layer_state(0)
    for index in range(1, 4):
        states = run_layer(adapter.layer(index), states, keywords[index])
    adapter.replace(0, 1, adapter.layer_state(1), slot=1)
    expected = model.head(model.rwkv.ln_out(states))
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert torch.equal(model.state_dict()[NORM], norm.weight)
    check_saved(model, tmp_path)


@torch.no_grad()
def test_saved_from_disk(tmp_path):
    """Layers on disk are saved with the norm of the embeddings under its own name."""
    model = pico_decoder("rwkv")
    loaded, ids = on_disk(model), tokens(model)
    adapter = ModelAdapter(loaded)
    adapter.replace(0, 1, adapter.layer_state(0))
    expected = loaded(ids, use_cache=False).logits
    folder = tmp_path / "saved"
    folder.mkdir()
    save_weights(loaded, folder, 10**6)
    loaded.config.save_pretrained(folder)
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(again.eval()(ids, use_cache=False).logits, expected)


def test_gated_projection_is_not_refitted():
    """Each channel of its output has another gate, so least squares would fit another model."""
    model = pico_decoder("rwkv")
    outputs = ("attention.output.weight", "feed_forward.value.weight")
    before = [
        {name: tensor.clone() for name, tensor in block.state_dict().items()}
        for block in model.rwkv.blocks
    ]
    plan = compress(
        model, tokens(model, 8), come_plus(), target_layers=3, batch_size=4, progress=False
    )
    merged = model.rwkv.blocks[plan.steps[0].first].state_dict()
    kept = [any(torch.equal(merged[name], own[name]) for own in before) for name in outputs]
    assert kept == [False, True]


def test_trials_do_not_refit_a_gated_projection():
    """The solution of unit selection, which reads the mean of the gates, is not used."""
    adapter, method = ModelAdapter(pico_decoder("rwkv")), come_plus(refit__target="current")
    with LayerStream(adapter, tokens(adapter.model), batch_size=2, progress=False) as stream:
        stream.embed()
        stream.advance(0, 3)
        span = span_of(stream, method, layers=(1, 2))
        split = method.retention.trial_split(span)
        assert set(split.solved) == {"mixer", "ffn"}
        found = method.refit.surrogate.solve(span.targets, span.sources(split))
    assert set(found) == {"attention.output.weight"}


@pytest.mark.parametrize(
    "method", [recipe("replaceme"), come_plus(refit__downstream=0.1)], ids=["replaceme", "later"]
)
def test_refits_of_a_gated_projection_are_refused(method):
    model = pico_decoder("rwkv")
    with pytest.raises(ValueError, match=r"gate multiplies its channels \(feed_forward.receptan"):
        compress(model, tokens(model), method, target_layers=3, batch_size=4, progress=False)


def test_width_of_the_recurrence():
    with pytest.raises(ValueError, match="attention_hidden_size=48"):
        layout_of(DECODERS["rwkv"](attention_hidden_size=48))


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm", "mamba", "lfm2"])
@torch.no_grad()
def test_caches_of_recurrences(model_type):
    """Checks, sampling and timing find the cache, whatever a type calls it."""
    model = pico_decoder(model_type)
    assert check_cache(model) < 1e-4
    starts = tokens(model, 3, 5)
    greedy = Sampling(top_p=1e-9)
    found = sample(model, starts, 9, greedy, torch.Generator(), progress=False)
    expected = starts
    for _ in range(4):
        logits = model(expected, use_cache=False).logits[:, -1]
        logits[:, :3] = -torch.inf  # begin, end and padding
        expected = torch.cat([expected, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
    speed = compare_speed({"own": model}, prompt_tokens=8, new_tokens=2, repeats=1, progress=False)[
        "own"
    ]
    assert speed.cache_bytes > 0
