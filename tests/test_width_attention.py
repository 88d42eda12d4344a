"""`merge.width_attention`: every layer keeps some of its KV groups and is refitted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.width import kept_groups
from come.models.adapter import ModelAdapter
from come.models.families import layout_of
from come.models.width import ATTENTION_TYPES
from tests.bases import save_base
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.decoders import DECODERS, pico_decoder
from tests.disk import all_tensors, on_disk
from tests.jobs import job_settings, run_job
from tests.methods import come_plus, come_scores, paper, recipe, same_weights

HALF = {"width_attention": 0.5}  # one KV group of two
BOTH = {**HALF, "width": 0.6, "width_multiple": 8}


def windows_of(seed, count=8, vocab=VOCAB):
    return torch.randint(3, vocab, (count, SEQ), generator=torch.Generator().manual_seed(seed))


def narrowed(model, method, target=LAYERS, **options):
    return compress(model, windows_of(7), method, target_layers=target, progress=False, **options)


@torch.no_grad()
def test_the_group_with_the_higher_score_is_kept_as_it_is():
    dense, model = pico("llama_gqa"), pico("llama_gqa")
    plan = narrowed(model, paper(**HALF))
    (scores,) = come_scores(windows_of(7), [0])["kv_group"]
    best = max(range(2), key=lambda group: scores[group])
    assert plan.steps[0].kept["kv_group"] == [[best]]
    before, after = dense.model.layers[0].self_attn, model.model.layers[0].self_attn
    queries, heads = slice(16 * best, 16 * best + 16), slice(8 * best, 8 * best + 8)
    assert torch.equal(after.q_proj.weight, before.q_proj.weight[queries])
    assert torch.equal(after.k_proj.weight, before.k_proj.weight[heads])
    assert torch.equal(after.v_proj.weight, before.v_proj.weight[heads])
    assert torch.equal(after.o_proj.weight, before.o_proj.weight[:, queries])
    own = model.config
    assert (own.num_attention_heads, own.num_key_value_heads, own.head_dim) == (2, 1, 8)
    assert plan.narrower == {"kv_group": 1}
    assert (plan.narrowed, plan.channels) == (LAYERS, 0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_bias", "mistral_sliding", "qwen2_gqa", "qwen3_wide"])
@pytest.mark.parametrize("name", ["come", "flap"])
def test_units_that_add_nothing_are_removed_without_a_trace(family, name):
    """The second KV group of even layers, the first of others, and eight channels are silent."""
    model = pico(family)
    for index, layer in enumerate(model.model.layers):
        output = layer.self_attn.o_proj.weight
        half = output.shape[1] // 2
        output[:, :half] *= index % 2 == 0
        output[:, half:] *= index % 2
        layer.mlp.down_proj.weight[:, 3:11] = 0
    wanted = model(windows_of(8)).logits
    plan = narrowed(model, recipe(name, **BOTH))
    assert [step.kept["kv_group"] for step in plan.steps] == [[[i % 2]] for i in range(LAYERS)]
    assert plan.narrower == {"kv_group": 1, "channel": 16}
    torch.testing.assert_close(model(windows_of(8)).logits, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ATTENTION_TYPES)
def test_checkpoints_of_every_type(model_type, tmp_path):
    """The smaller model is an ordinary checkpoint, and its plan rebuilds the weights."""
    model, windows = pico_decoder(model_type), windows_of(7, 4, 96)
    layers, before = model.config.num_hidden_layers, ModelAdapter(model).layer_layout(0)
    method = (come_plus if model_type in ("llama", "gemma2") else paper)(**HALF)
    plan = compress(model, windows, method, target_layers=layers, progress=False)
    groups = before.unit_counts["kv_group"]
    assert plan.narrower == {"kv_group": groups // 2}
    model.save_pretrained(tmp_path / "model")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_key_value_heads == groups // 2
    torch.testing.assert_close(loaded(windows).logits, model(windows).logits, rtol=1e-5, atol=1e-5)
    generated = model.generate(windows[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    again = loaded.generate(windows[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(generated, again)
    plan.save(tmp_path / "plan.json")
    assert same_weights(apply(Plan.load(tmp_path / "plan.json"), pico_decoder(model_type)), model)


@torch.no_grad()
def test_the_refit_lowers_the_error_on_unseen_windows():
    unseen, errors = windows_of(8, 32), {}
    wanted = pico("llama_gqa")(unseen).logits.double()
    for refit in ("none", "ridge"):
        model = pico("llama_gqa")
        method = recipe("come_plus", refit=refit, **HALF)
        compress(model, windows_of(7, 64), method, target_layers=LAYERS, progress=False)
        errors[refit] = float((model(unseen).logits.double() - wanted).square().mean())
    assert errors["ridge"] < 0.9 * errors["none"]


def test_after_depth_interrupted_and_on_disk(tmp_path):
    saved = []

    def keep(plan):
        saved.append(tmp_path / f"plan{len(saved)}.json")
        plan.save(saved[-1])

    model, method = pico("llama_gqa"), come_plus(m=2, refit="ridge", **BOTH)
    found = narrowed(model, method, LAYERS - 1, on_step=keep)
    assert [step.last - step.first for step in found.steps] == [1, *[0] * (LAYERS - 1)]
    again = pico("llama_gqa")
    assert narrowed(again, method, LAYERS - 1, plan=Plan.load(saved[3])).hash == found.hash
    assert same_weights(again, model)
    disk = on_disk(pico("llama_gqa"))
    assert narrowed(disk, method, LAYERS - 1).hash == found.hash
    tensors = all_tensors(disk)
    assert all(torch.equal(tensors[name], own) for name, own in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "share", "message"),
    [
        (
            DECODERS["opt"](),
            0.5,
            "model type 'opt' .* supported are llama, .*; leave merge.width_a",
        ),
        (DECODERS["mamba"](), 0.5, "no attention with separate KV groups .the first is layer 0"),
        (LlamaConfig(num_key_value_heads=1), 0.5, "keeps all 1 KV groups"),
        (
            LlamaConfig(hidden_size=32, num_attention_heads=8, num_hidden_layers=2),
            0.75,
            "keeps 6 of 8 KV groups, .* does not allow 6 heads; it allows 1, 2, 4 KV groups",
        ),
    ],
)
def test_models_that_are_refused(config, share, message):
    with pytest.raises(ValueError, match=message):
        kept_groups(paper(width_attention=share), config, layout_of(config).layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_attention": 0}, r"merge.width_attention=0: must be a number above 0"),
        ({**HALF, "operator": "average"}, r"merge.width_attention=0.5 .*merge.operator=average"),
        ({**HALF, "sublayers": ["ffn"]}, r"merge.width_attention=0.5 .*merge.sublayers"),
    ],
)
def test_methods_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paper(**changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge.sparsity=0.2",), r"merge.sparsity=0.2 .*merge.width_attention=0.5 removes units"),
        (("distill=come_sp",), r"merge.width_attention=0.5: distillation .*distill=none"),
        (("merge.budget.parameters=0.8",), r"both .* and merge.width_attention=0.5 are given"),
    ],
)
def test_jobs_that_are_refused(words, message, tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    with pytest.raises(ValueError, match=message):
        job_settings(base, "merge.target_layers=null", "merge.width_attention=0.5", *words)


def test_a_job_counts_its_parameters(tmp_path):
    base, own = save_base(tmp_path / "base", "llama_bias"), tmp_path / "own"
    words = ("merge.width_attention=0.5", "merge.width=0.6", "merge.width_multiple=8")
    result = run_job(base, own, "merge.target_layers=null", "eval=none", *words)
    model = AutoModelForCausalLM.from_pretrained(own / "model")
    assert model.config.num_key_value_heads == 1
    assert result["depths"][1]["parameters"] == sum(p.numel() for p in model.parameters())
    assert "16 of 24 FFN channels and 1 of 2 KV groups" in (own / "report.md").read_text()
    card = (own / "model" / "README.md").read_text()
    assert "keeping 16 of 24 FFN channels and 1 of 2 KV groups in every layer" in card
