"""`merge.width`: every layer keeps some of its FFN channels and is refitted."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.width import kept_channels
from come.models.adapter import ModelAdapter
from come.models.families import FAMILIES, layout_of
from come.models.width import CHANNEL, channels_of, set_channels
from tests.bases import save_base
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.decoders import DECODERS, pico_decoder
from tests.disk import all_tensors, on_disk
from tests.jobs import job_settings, prepare_job, run_job
from tests.methods import come_plus, paper, recipe, same_weights

WIDTH = {"width": 0.6, "width_multiple": 8}
CHANNELS = 16  # of 24
WORDS = ("merge.width=0.6", "merge.width_multiple=8")
NO_KEY = {"bloom", "mpt", "xlstm"}  # a fixed ratio to the hidden size


def windows_of(seed, count=16, vocab=VOCAB):
    return torch.randint(3, vocab, (count, SEQ), generator=torch.Generator().manual_seed(seed))


def narrowed(model, method, target=LAYERS, **options):
    return compress(model, windows_of(7), method, target_layers=target, progress=False, **options)


@torch.no_grad()
def test_the_first_layer_is_the_ridge_solution_of_its_kept_channels():
    """A float64 reference from the dense layer: attention is unchanged, down_proj is solved for."""
    dense, model, windows = pico("llama_gqa").double(), pico("llama_gqa").double(), windows_of(7)
    plan = narrowed(model, come_plus(refit="ridge", align=None, refit__lambda=0.3, **WIDTH))
    (kept,) = plan.steps[0].kept["channel"]
    assert len(kept) == CHANNELS
    assert kept == sorted(set(kept))
    seen = {}
    own, merged = dense.model.layers[0], model.model.layers[0]
    handles = [
        own.mlp.register_forward_hook(lambda _, inputs, out: seen.update(read=inputs[0], out=out)),
        own.register_forward_hook(lambda _, inputs, out: seen.update(after=out)),
    ]
    dense(windows)
    for handle in handles:
        handle.remove()
    read, out, after = (seen[key].flatten(0, 1) for key in ("read", "out", "after"))
    gate, up, down = own.mlp.gate_proj.weight, own.mlp.up_proj.weight, own.mlp.down_proj.weight
    features = torch.nn.functional.silu(read @ gate[kept].T) * (read @ up[kept].T)
    weights = 1 / after.square().mean(dim=1)
    gram = (features * weights[:, None]).T @ features
    missing = out - features @ down[:, kept].T
    penalty = 0.3 * gram.diagonal().mean()
    rhs = (missing * weights[:, None]).T @ features
    solved = down[:, kept] + torch.linalg.solve(gram + penalty * torch.eye(CHANNELS), rhs.T).T
    torch.testing.assert_close(merged.mlp.down_proj.weight, solved, rtol=1e-5, atol=1e-6)
    scale = own.post_attention_layernorm.weight / merged.post_attention_layernorm.weight
    torch.testing.assert_close(merged.mlp.gate_proj.weight, gate[kept] * scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.mlp.up_proj.weight, up[kept] * scale, rtol=1e-6, atol=0)
    output = merged.self_attn.o_proj.weight
    torch.testing.assert_close(output, own.self_attn.o_proj.weight, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_refit_lowers_the_error_on_unseen_windows():
    """With 1024 calibration tokens; with 256, the refit overfits this random model (1.06 x)."""
    unseen, windows = windows_of(8, 64), windows_of(7, 64)
    wanted, errors = pico("llama_gqa")(unseen).logits.double(), {}
    for refit in ("none", "ridge"):
        model = pico("llama_gqa")
        method = recipe("come_plus", refit=refit, **WIDTH)
        compress(model, windows, method, target_layers=LAYERS, progress=False)
        errors[refit] = float((model(unseen).logits.double() - wanted).square().mean())
    assert errors["ridge"] < 0.9 * errors["none"]


@torch.no_grad()
def test_layers_that_only_lose_channels_are_fitted_to_their_own_output():
    """By default; merged layers are fitted to the dense model."""
    for target, changes, like in (
        (LAYERS, WIDTH, "current"),
        (LAYERS, WIDTH | {"schedule": "one_shot"}, "current"),
        (LAYERS - 2, {"groups": [[1, 2], [3, 4]]}, "dense"),
    ):
        found = {}
        for name in ("auto", "dense", "current"):
            found[name] = pico("llama_gqa")
            narrowed(found[name], come_plus(**changes, target=name), target)
        other = {"dense": "current", "current": "dense"}[like]
        assert same_weights(found["auto"], found[like])
        assert not same_weights(found["auto"], found[other])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "phi3", "gpt2"])
@pytest.mark.parametrize("name", ["come_plus", "come", "flattengpt", "flap"])
def test_checkpoints_of_families(family, name, tmp_path):
    """The narrower model is an ordinary checkpoint, and its plan rebuilds the weights."""
    model, windows = pico_decoder(family), windows_of(7, 6, 96)
    layers = model.config.num_hidden_layers
    method = recipe(name, **WIDTH)
    plan = compress(model, windows, method, target_layers=layers, progress=False)
    adapter = ModelAdapter(model)
    assert [layout.unit_counts["channel"] for layout in adapter.layout.layers] == [24] * layers
    assert plan.channels == 24
    assert plan.narrowed == layers
    model.save_pretrained(tmp_path / "model")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(windows).logits
    torch.testing.assert_close(loaded(windows).logits, logits, rtol=1e-5, atol=1e-5)
    plan.save(tmp_path / "plan.json")
    assert same_weights(apply(Plan.load(tmp_path / "plan.json"), pico_decoder(family)), model)


@pytest.mark.parametrize("make", [come_plus, paper])
def test_width_after_depth_interrupted_and_on_disk(make, tmp_path):
    saved = []

    def keep(plan):
        saved.append(tmp_path / f"plan{len(saved)}.json")
        plan.save(saved[-1])

    model = pico("llama_gqa")
    found = narrowed(model, make(m=2, **WIDTH), LAYERS - 1, on_step=keep)
    assert [step.last - step.first for step in found.steps] == [1, *[0] * (LAYERS - 1)]
    assert found.truncated(LAYERS - 1) is found
    for path in saved[0], saved[3]:
        again = pico("llama_gqa")
        plan = narrowed(again, make(m=2, **WIDTH), LAYERS - 1, plan=Plan.load(path))
        assert plan.hash == found.hash
        assert same_weights(again, model)
    disk = on_disk(pico("llama_gqa"))
    assert narrowed(disk, make(m=2, **WIDTH), LAYERS - 1).hash == found.hash
    tensors = all_tensors(disk)
    assert all(torch.equal(tensors[name], own) for name, own in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"retention": "joint"}, {"retention": "posterior"}, {"schedule": "one_shot"},
        {"sensitivity": "taylor"}, {"refit": "ridge", "target": "current"},
        {"groups": [[1, 2], [4, 5]]},
    ],
    ids=str,
)  # fmt: skip
def test_methods_that_narrow_layers(changes):
    model = pico("llama_gqa")
    plan = narrowed(model, paper(**changes, **WIDTH), 4)
    assert plan.channels == model.config.intermediate_size == CHANNELS
    assert same_weights(apply(plan, pico("llama_gqa")), model)


def refused(config):
    """Why the layers of a type cannot be narrowed; empty if they can be."""
    try:
        channels_of(layout_of(config).layers)
        set_channels(config, 24)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model_type", sorted(set(DECODERS) & set(FAMILIES)))
def test_the_configuration_of_every_family(model_type):
    """A type is refused, or transformers builds it with exactly the expected shapes."""
    try:
        layouts = layout_of(DECODERS[model_type]()).layers
    except ValueError:
        return  # this form of the type is not supported at all
    config, narrower = DECODERS[model_type](), DECODERS[model_type]()
    if reason := refused(narrower):
        without = any(own.routed or CHANNEL not in own.unit_counts for own in layouts)
        expected = "layers have experts, or no FFN" if without else "has no single number"
        assert expected in reason
        assert without or model_type in NO_KEY
        return
    shapes, full = [], channels_of(layouts)
    for each in (config, narrower):
        with torch.device("meta"):
            adapter = ModelAdapter(AutoModelForCausalLM.from_config(each))
        layers = [layer.state_dict() for layer in adapter.layers]
        shapes.append([{name: list(t.shape) for name, t in own.items()} for own in layers])
    for index, layer in enumerate(shapes[0]):
        for name, shape in layer.items():
            role = adapter.roles(index)[name]
            if role.unit == CHANNEL:
                shape[role.axis] = shape[role.axis] // full * 24
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"merge.width=0: must be a number above 0 and of at most 1"),
        ({"width": 1.1}, r"merge.width=1.1: must be a number above 0"),
        ({"width": 0.5, "width_multiple": 0}, r"merge.width_multiple=0: must be a whole number"),
        ({"width": 0.5, "operator": "average"}, r"merge.width=0.5 .*merge.operator=average"),
        ({"width": 0.5, "sublayers": ["ffn"]}, r"merge.width=0.5 .*merge.sublayers"),
        ({"width": 0.5, "refit": "ridge", "downstream": 0.1}, r"merge.width=0.5 .*downstream=0.1"),
    ],
)
def test_methods_that_cannot_narrow(changes, message):
    with pytest.raises(ValueError, match=message):
        paper(**changes)


@pytest.mark.parametrize(
    ("width", "multiple", "channels"), [(0.6, 8, 24), (0.5, 1, 20), (0.01, 8, 8), (0.75, 8, 32)]
)
def test_rounding(width, multiple, channels):  # of 40 channels
    config, method = DECODERS["llama"](), paper(width=width, width_multiple=multiple)
    assert kept_channels(method, config, layout_of(config).layers) == channels


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", "keeps all 40 FFN channels, .* a multiple of 64"),
        ("mixtral", "4 of this model's 4 layers have experts"),
        ("bloom", "'bloom' has no single number of FFN channels"),
    ],
)
def test_models_that_cannot_be_narrowed(model_type, message):
    config = DECODERS[model_type]()
    method = paper(width=0.5) if model_type == "llama" else paper(width=0.5, width_multiple=8)
    with pytest.raises(ValueError, match=message):
        kept_channels(method, config, layout_of(config).layers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge.target_layers=null", "merge.sparsity=0.2"), r"merge.sparsity=0.2 .*merge.width"),
        (("merge.save_at=[5]", "merge.target_layers=4"), r"merge.save_at=\[5\].*as a sweep"),
        (("distill=come_sp",), r"merge.width=0.6: distillation .*distill=none"),
        (("merge.width=1",), r"merge.width_multiple has no effect with merge.width=1"),
    ],
)
def test_jobs_that_are_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        job_settings(save_base(tmp_path / "base", "llama_gqa"), *WORDS, *words)


def test_experts_are_refused_before_weights_are_loaded(tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa")
    with pytest.raises(ValueError, match="keeps all 24 FFN channels"):
        prepare_job(base, tmp_path / "job", "merge.width=0.9")


def test_jobs(tmp_path):
    """Without depth and from the plan: the parameters that are left, and the same weights."""
    base, own = save_base(tmp_path / "base", "llama_gqa"), tmp_path / "own"
    words = ("merge.target_layers=null", "eval=none")
    result = run_job(base, own, *words, *WORDS)
    model = AutoModelForCausalLM.from_pretrained(own / "model")
    assert model.config.intermediate_size == CHANNELS
    dense, merged = result["depths"]
    assert (dense["layers"], merged["layers"]) == (LAYERS, LAYERS)
    assert merged["parameters"] == sum(p.numel() for p in model.parameters())
    share = 1 - merged["parameters"] / dense["parameters"]
    assert merged["sparsity"] == pytest.approx(share, abs=1e-12)
    assert f"{CHANNELS} of 24" in (own / "report.md").read_text()
    assert f"keeping {CHANNELS} of 24 FFN channels" in (own / "model" / "README.md").read_text()
    plan = f"merge.plan={own / 'plan.json'}"
    again = run_job(base, tmp_path / "again", "merge=from_plan", plan, *words)
    assert again["depths"][1]["parameters"] == merged["parameters"]
    first, second = (
        load_file(folder / "model" / "model.safetensors") for folder in (own, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
