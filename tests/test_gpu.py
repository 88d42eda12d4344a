"""On a CUDA device: the same plans, weights and numbers as on the CPU."""

import json

import pytest
import torch

import come
from come.evaluate.perplexity import perplexity
from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from tests.commands import communicate
from tests.conftest import LAYERS, pico
from tests.disk import all_tensors, on_disk
from tests.methods import recipe
from tests.test_distill_cli import TRAIN
from tests.test_methods import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES_HERE = ["llama_gqa", "llama_bias", "mistral_sliding", "qwen3_gqa", "opt"]


def close(first, second, tolerance):
    """Whether all weights agree, relative to each tensor's largest value."""
    here, there = first.state_dict(), second.state_dict()
    return here.keys() == there.keys() and all(
        (here[name].cpu() - there[name].cpu()).abs().max()
        <= tolerance * there[name].abs().max().cpu()
        for name in there
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_plan_equals_that_on_the_cpu(family, name, windows):
    models = {device: pico(family).to(device) for device in ("cpu", "cuda")}
    plans = {
        device: compress(model, windows, recipe(name), target_layers=LAYERS - 2, progress=False)
        for device, model in models.items()
    }
    cpu, cuda = plans["cpu"], plans["cuda"]
    assert [(s.first, s.last, s.kept) for s in cuda.steps] == [
        (s.first, s.last, s.kept) for s in cpu.steps
    ]
    assert close(models["cuda"], models["cpu"], 2e-3)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_problems_that_do_not_fit_are_solved_on_the_cpu(family, windows, monkeypatch):
    plans = []
    for free in (10**12, 0):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 10**12))
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
        model = pico(family).to("cuda")
        method = recipe("come_plus")
        plans.append(compress(model, windows, method, target_layers=LAYERS - 2, progress=False))
    assert [(s.first, s.last, s.kept) for s in plans[0].steps] == [
        (s.first, s.last, s.kept) for s in plans[1].steps
    ]


def test_inputs_in_main_memory_are_read_in_tiles(windows, monkeypatch):
    """The dual problem is on the GPU and its inputs are not; the units are the same."""
    monkeypatch.setattr("come.merge.joint_selection.DUAL", 0)
    monkeypatch.setattr("come.merge.output_map.DUAL", 0)
    monkeypatch.setattr("come.linalg.dual.COLUMNS", 24)
    plans = []
    for fit in (True, False):
        monkeypatch.setattr("come.merge.output_map.fits", lambda device, needed, fit=fit: fit)
        model, method = pico("llama_gqa").to("cuda"), recipe("come_plus")
        plans.append(compress(model, windows, method, target_layers=LAYERS - 2, progress=False))
    assert [(s.first, s.last, s.kept) for s in plans[0].steps] == [
        (s.first, s.last, s.kept) for s in plans[1].steps
    ]


@pytest.mark.parametrize("name", ["come_plus", "come", "sleb", "taylor_plus"])
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_layers_on_disk(family, name, windows):
    """Plans and weights equal those with layers on the device, bit for bit."""
    models = [pico(family).to("cuda"), on_disk(pico(family), device="cuda")]
    plans = [
        compress(model, windows, recipe(name), target_layers=LAYERS - 2, progress=False)
        for model in models
    ]
    assert plans[0].hash == plans[1].hash
    own, stored = map(all_tensors, models)
    assert all(torch.equal(stored[key].cpu(), tensor.cpu()) for key, tensor in own.items())


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_stores_give_the_same_plan(store, windows, tmp_path):
    plans = [
        compress(
            pico("llama_gqa").to("cuda"), windows, recipe("come_plus"), target_layers=LAYERS - 2,
            store=kind, folder=tmp_path, progress=False,
        )
        for kind in ("memory", store)
    ]  # fmt: skip
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", ["come", "come_plus"])
def test_half_precision(name, windows):
    model = pico("llama_gqa").to("cuda", torch.bfloat16)
    plan = compress(model, windows, recipe(name), target_layers=LAYERS - 2, progress=False)
    assert model.config.num_hidden_layers == LAYERS - 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(plan.history) == LAYERS - 2


def test_gpu_plan_applied_on_the_cpu(windows, tmp_path):
    model = pico("qwen3_gqa").to("cuda")
    plan = compress(model, windows, recipe("come_plus"), target_layers=LAYERS - 2, progress=False)
    plan.save(tmp_path / "plan.json")
    applied = apply(Plan.load(tmp_path / "plan.json"), pico("qwen3_gqa"))
    assert close(applied, model, 1e-5)


def test_losses_equal_those_on_the_cpu(windows):
    found = [
        perplexity(pico("opt").to(device), windows, batch_tokens=32, progress=False).samples
        for device in ("cpu", "cuda")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_self_generated_calibration(pico_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pico_folder).to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    plan = come.compress(
        model, tokenizer, target_layers=21, num_samples=4, seq_len=32, progress=False
    )
    assert len(plan.history) == 21


@pytest.mark.process
@pytest.mark.parametrize("distill", ["none", "come_sp", "come_mp", "lora"])
def test_complete_run(distill, command, tmp_path):
    words = [] if distill == "none" else TRAIN
    folder = tmp_path / "run"
    code, output, errors = communicate(
        command(f"distill={distill}", *words, "model.device=cuda", f"hydra.run.dir={folder}")
    )
    assert code == 0, errors + output
    text = (folder / "result.json").read_text()
    assert torch.cuda.get_device_name() in text
    ratios = [depth["metrics"]["perplexity"] for depth in json.loads(text)["depths"]]
    assert len(ratios) == (2 if distill == "none" else 3)
