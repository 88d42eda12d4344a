"""Which parameters each distillation method trains."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import MistralForCausalLM

from come.distill.memory import training_memory
from come.distill.objectives.base import DISTILL
from tests.commands import ROOT, load_script
from tests.methods import decoder_layers
from tests.test_distill import pair, run


@pytest.mark.parametrize("trained", ["layers", "norms", "outputs", "lora"])
def test_train_setting_selects_the_trained_parameters(trained, windows, tmp_path):
    given = pair()
    before = copy.deepcopy(given.student.model)
    method = DISTILL.create_from("come_sp", {"train": trained})
    objective = method.objective(given)
    run(objective, windows[:4], windows[:4], tmp_path, steps=2, learning_rate=1e-3)
    method.write_back(given)
    changed = {
        name.split(".", 3)[-1]
        for (name, new), old in zip(
            given.student.model.named_parameters(), before.parameters(), strict=True
        )
        if not torch.equal(new, old)
    }
    every = dict(decoder_layers(before)[0].named_parameters())
    expected = {
        "layers": set(every),
        "norms": {name for name in every if "layernorm" in name},
        "outputs": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
        "lora": {name for name in every if "proj" in name},
    }
    assert changed == expected[trained]


@pytest.mark.parametrize("name", ["come_mp", "logits"])
def test_train_setting_of_other_methods(name):
    objective = DISTILL.create_from(name, {"train": "norms"}).objective(pair(), 1)
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in objective.trained} == {
        "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip


def test_settings_of_baselines():
    assert DISTILL.create_from("logits", {"temperature": 3.0}).temperature == 3.0
    sizes = [
        training_memory(DISTILL.create_from(name, {"lora_rank": rank} | more).objective(pair()))
        for name, more in (("lora", {}), ("logits", {"train": "lora"}))
        for rank in (1, 2)
    ]
    for one, two in (sizes[:2], sizes[2:]):
        assert two.parameters == 2 * one.parameters


def test_default_lora_rank_matches_the_size_of_merged_layers():
    sizes = {}
    for name in ("come_sp", "lora"):
        sizes[name] = training_memory(DISTILL.create_from(name).objective(pair())).parameters
    assert 0.6 < sizes["lora"] / sizes["come_sp"] < 1.7  # ranks are integers


def test_scale_of_adapters():
    given = pair()
    DISTILL.create_from("lora", {"lora_rank": 3}).objective(given)
    layers = [m for m in given.student.model.modules() if isinstance(m, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_memory_of_a_large_model_from_its_shape(monkeypatch):
    """Two of four layers train: in float32 instead of bfloat16, with gradients and two moments."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script = load_script("distill/large_models")
    config = script.random_config("pico", 4)
    model = MistralForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    found = script.student_memory(config, 2, "merged", "layers", 1, "adamw")
    assert found.parameters == 2 * layer
    assert found.weights == 2 * whole + 2 * 2 * layer
    assert (found.gradients, found.optimizer) == (4 * 2 * layer, 8 * 2 * layer)
    lora = script.student_memory(config, 2, "all", "lora", 3, "adamw")
    maps = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert lora.parameters == sum(3 * (m.in_features + m.out_features) for m in maps)
