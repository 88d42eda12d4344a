"""`merge=flap`: the channels that fluctuate most, and the mean of the others as a bias."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.merge.loop import compress
from come.models.adapter import ModelAdapter
from come.schema.explicit import check_explicit
from tests.bases import save_base
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.disk import on_disk
from tests.jobs import job_settings, prepare_job, run_job, settings
from tests.methods import paper, recipe

WIDTH = {"width": 0.6, "width_multiple": 8}
CHANNELS = 16  # of 24
WORDS = ("merge=flap", "merge.width=0.6", "merge.width_multiple=8", "merge.target_layers=null")


def windows_of(seed, count=8):
    return torch.randint(3, VOCAB, (count, SEQ), generator=torch.Generator().manual_seed(seed))


def narrowed(model, **changes):
    method = recipe("flap", **WIDTH | changes)
    return compress(model, windows_of(7), method, target_layers=LAYERS, progress=False)


def maps(model, index):
    """The input projections and the output projection of an FFN."""
    layer = ModelAdapter(model).layers[index]
    if hasattr(layer, "fc1"):
        return [layer.fc1], layer.fc2
    return [layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "llama_bias", "llama_gqa"])
def test_the_first_layer_is_that_of_the_formulas(family):
    """A float64 reference from the inputs of the dense layer's output projection."""
    dense, model, windows = pico(family).double(), pico(family).double(), windows_of(7)
    seen = []
    inputs, output = maps(dense, 0)
    handle = output.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    dense(windows)
    handle.remove()
    features, weight = seen[0], output.weight
    scores = features.var(dim=0, correction=0) * weight.square().sum(dim=0)
    kept = sorted(scores.argsort(descending=True)[:CHANNELS].tolist())
    removed = sorted(set(range(24)) - set(kept))
    plan = narrowed(model)
    assert plan.steps[0].kept["channel"] == [kept]
    own_inputs, own = maps(model, 0)
    for before, after in zip(inputs, own_inputs, strict=True):
        assert torch.equal(after.weight, before.weight[kept])
    assert torch.equal(own.weight, weight[:, kept])
    if family == "llama_gqa":
        assert own.bias is None
        assert not any(step.solved.tensors for step in plan.steps)
        return
    bias = output.bias + weight[:, removed] @ features.mean(dim=0)[removed]
    torch.testing.assert_close(own.bias, bias, rtol=1e-9, atol=1e-12)
    assert (own.bias - output.bias).abs().max() > 1e-4


@torch.no_grad()
def test_constant_channels_are_removed_without_a_trace():
    """Channels whose activation is one number for all tokens: logits stay the same.

    On the calibration windows: other channels may be 0 on all of them.
    """
    model = pico("opt").double()
    for index in range(LAYERS):
        ((up,), _) = maps(model, index)
        up.weight[3:11] = 0
        up.bias[3:11] = torch.linspace(0.1, 1, 8)
    wanted = model(windows_of(7)).logits
    narrowed(model)
    assert model.config.ffn_dim == CHANNELS
    torch.testing.assert_close(model(windows_of(7)).logits, wanted, rtol=1e-9, atol=1e-10)


def test_every_layer_sees_the_states_of_the_narrowed_ones():
    """Mean FFN outputs over calibration are those of the dense layer on the same states."""
    model, dense = pico("opt").double(), pico("opt").double()
    found = {}
    narrowed(model)
    with torch.no_grad():
        for index in (2, 5):
            handle = maps(model, index)[1].register_forward_hook(
                lambda _, __, out, index=index: found.update({index: out.flatten(0, -2).mean(0)})
            )
            model(windows_of(7))
            handle.remove()
            layers = ModelAdapter(model).layers
            own, layers[index] = layers[index], ModelAdapter(dense).layers[index]
            handle = maps(model, index)[1].register_forward_hook(
                lambda _, __, out: found.update(dense=out.flatten(0, -2).mean(0))
            )
            model(windows_of(7))
            handle.remove()
            layers[index] = own
            torch.testing.assert_close(found[index], found["dense"], rtol=1e-9, atol=1e-10)


def test_a_model_without_biases_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING, "come"):
        narrowed(pico("llama_gqa"))
    assert sum("mlp.down_proj has no bias" in record.message for record in caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "come"):
        narrowed(pico("opt"))
    assert not caplog.records


@pytest.mark.parametrize("family", ["opt", "llama_bias"])
def test_layers_on_disk_give_the_same_plan(family):
    plan = narrowed(pico(family))
    assert narrowed(on_disk(pico(family))).hash == plan.hash


def test_a_job_is_an_ordinary_checkpoint(tmp_path):
    base = save_base(tmp_path / "base", "llama_bias")
    result = run_job(base, tmp_path / "job", *WORDS, "eval=none")
    assert [depth["layers"] for depth in result["depths"]] == [LAYERS, LAYERS]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "job" / "model")
    assert model.config.intermediate_size == CHANNELS
    assert model.config.num_hidden_layers == LAYERS
    assert result["depths"][1]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1}, r"merge.refit=flap .* merge.width=1 keeps all .* a smaller merge.width"),
        ({"groups": [[1, 2]]}, r"merge.refit=flap narrows .* leave merge.groups=\[\[1, 2\]\] out"),
        ({"operator": "average"}, r"merge.operator=average"),
        ({"downstream": 0.1}, r"merge.width=0.6 .*downstream=0.1"),
        ({"target": "dense"}, r"merge.refit.target='dense': must be"),
    ],
)
def test_methods_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paper(**{"refit": "flap", "sensitivity": "fluctuation"} | WIDTH | changes)


def test_depths_are_refused(tmp_path):
    message = "merge.refit=flap narrows layers .* merge.target_layers=5 is not the model's depth, 6"
    with pytest.raises(ValueError, match=message):
        compress(pico("opt"), windows_of(7), recipe("flap", **WIDTH), target_layers=5)
    base = save_base(tmp_path / "base", "llama_bias")
    with pytest.raises(ValueError, match=message):
        prepare_job(base, tmp_path / "job", *WORDS[:3], "merge.target_layers=5")
    with pytest.raises(ValueError, match="merge.sparsity=0.2 .*merge.width=0.6"):
        job_settings(base, *WORDS, "merge.sparsity=0.2")


@pytest.mark.parametrize("word", ["merge.selection=magnitude", "merge.m=3", "merge.protect_last=1"])
def test_settings_of_merges_have_no_effect(word):
    words = ["merge=flap", word]
    with pytest.raises(ValueError, match=r"has no effect with merge.refit=flap, which merges no"):
        check_explicit(settings(*words), words)
