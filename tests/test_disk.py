"""Models with layers on disk: the same results as in memory, with one layer loaded at a time."""

import gc
import json
import time
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from come.data.sampling import self_generated_windows
from come.evaluate.perplexity import perplexity
from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan
from come.merge.retention.adaptive import Adaptive
from come.merge.saving import check_cache
from come.merge.selection import trial_kl
from come.models.adapter import ModelAdapter
from come.models.loading import choose_weights, inspect_model, load_weights
from come.models.weights import layers_on_disk, save_weights
from come.stream.candidates import Candidate, losses
from come.stream.stream import LayerStream
from tests.conftest import FAMILIES, LAYERS, pico
from tests.disk import all_tensors, on_disk
from tests.jobs import QUICK, local_task, prepare_job, run_job
from tests.methods import paper, recipe

TARGET = LAYERS - 2


def layers_in_memory(model):
    """Indices of the layers with weights in memory."""
    stack = ModelAdapter(model).layers
    return [i for i, layer in enumerate(stack) if not next(layer.parameters()).is_meta]


def layers_read(model, monkeypatch):
    """A list to which every layer read from disk is appended."""
    read, disk = [], layers_on_disk(model)
    if disk is not None:
        original = disk._read
        monkeypatch.setattr(disk, "_read", lambda layer: read.append(layer) or original(layer))
    return read


def memory_and_disk(family, windows, method, **given):
    """Yields plan and tensors of a compression in memory, then with layers on disk."""
    for model in (pico(family), on_disk(pico(family))):
        plan = compress(model, windows, method(), target_layers=TARGET, progress=False, **given)
        yield plan, all_tensors(model)


@pytest.mark.parametrize("name", ["come_plus", "come", "sleb", "laco", "replaceme", "taylor_plus"])
@pytest.mark.parametrize("family", ["llama_bias", "llama_tied", "opt"])
def test_plans_and_weights_equal_those_in_memory(family, name, windows):
    """Bit for bit; `python -m tests.golden --weights disk` checks all recipes and families."""
    (plan, tensors), (other, stored) = memory_and_disk(family, windows, lambda: recipe(name))
    assert other.hash == plan.hash
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("sensitivity", ["taylor", "path_attribution"])
def test_gradients_equal_those_in_memory(sensitivity, windows):
    (plan, _), (other, _) = memory_and_disk(
        "llama_gqa", windows, lambda: paper(sensitivity=sensitivity)
    )
    assert other.hash == plan.hash


def test_at_most_one_layer_is_in_memory(windows):
    model = on_disk(pico("llama_gqa"))
    assert layers_in_memory(model) == []
    most = []
    for layer in ModelAdapter(model).layers:
        layer.register_forward_hook(lambda *_: most.append(len(layers_in_memory(model))))
    plan = compress(model, windows, recipe("come_plus"), target_layers=TARGET, progress=False)
    assert plan.num_layers == TARGET == model.config.num_hidden_layers
    assert max(most) == 1


def test_sweep_reads_every_layer_once(windows, monkeypatch):
    """All batches pass through a layer while it is loaded."""
    model = on_disk(pico("llama_gqa"))
    read = layers_read(model, monkeypatch)
    perplexity(model, windows, batch_tokens=windows.shape[1], progress=False)
    assert read == list(ModelAdapter(model).layers)


def test_candidates_share_one_sweep_over_later_layers(windows, monkeypatch):
    """Three drops: every layer is read once for all, and the losses equal those in memory."""
    found = []
    for model in (pico("llama_gqa"), on_disk(pico("llama_gqa"))):
        with LayerStream(ModelAdapter(model), windows, progress=False) as stream:
            stream.embed()
            stream.advance(0, LAYERS - 1)
            read = layers_read(model, monkeypatch)
            drops = [Candidate(index, [], index + 1) for index in (1, 2, 3)]
            found.append(losses(stream, drops))
    assert found[0] == found[1]
    assert read == list(ModelAdapter(model).layers)[2:]


@pytest.mark.parametrize("chosen", [
    pytest.param("zero_shot", marks=pytest.mark.slow), "continuations",
])  # fmt: skip
def test_zero_shot_and_continuations_equal_those_in_memory(chosen, base, tmp_path, monkeypatch):
    words = ["merge.target_layers=4", f"eval={chosen}"]
    if chosen == "zero_shot":
        words += local_task(tmp_path / "tasks")
    results = []
    for weights in ("memory", "disk"):
        monkeypatch.setenv("COME_CACHE", str(tmp_path / f"cache-{weights}"))
        run = run_job(base, tmp_path / weights, *words, f"model.weights={weights}")
        results.append(run["depths"])
    assert results[0] == results[1]
    assert results[0][1]["metrics"]


def test_written_layer_replaces_a_prefetched_one(tmp_path):
    """The new tensors are read even after a prefetch of the old ones; the old file is deleted."""
    pico("llama_gqa").save_pretrained(tmp_path / "model")
    model = load_weights(tmp_path / "model", weights="disk", scratch=tmp_path)
    adapter = ModelAdapter(model)
    for factor in (2, 3):
        adapter.layer(1)
        adapter.layer(2)  # prefetches layer 3
        state = {name: tensor * factor for name, tensor in adapter.layer_state(3).items()}
        adapter.write(3, state)
        found = dict(adapter.layer(3).named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert len(list(tmp_path.glob("weights-*/*"))) == 1
    del model, adapter, found
    for _ in range(200):  # a prefetch may still run; models are reference cycles
        gc.collect()
        if not list(tmp_path.glob("weights-*")):
            break
        time.sleep(0.02)
    assert not list(tmp_path.glob("weights-*"))


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_gqa", "opt"])
def test_evaluation_and_sampling_equal_those_in_memory(family, windows):
    model, stored = pico(family), on_disk(pico(family))
    assert perplexity(stored, windows, progress=False) == perplexity(model, windows, progress=False)
    assert check_cache(stored) == pytest.approx(check_cache(model), abs=1e-9)
    words = {"num_samples": 3, "seq_len": 8, "progress": False}
    sampled = [self_generated_windows(each, **words).windows for each in (model, stored)]
    assert torch.equal(*sampled)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("shard_bytes", [2**30, 9000])
def test_transformers_loads_saved_shards(family, shard_bytes, windows, tmp_path):
    model = on_disk(pico(family))
    compress(model, windows, recipe("come"), target_layers=TARGET, progress=False)
    save_weights(model, tmp_path, shard_bytes)
    model.config.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes > 2**20:
        assert files == ["model.safetensors"]
    else:
        assert len(files) > 2
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = all_tensors(model)
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["come", "come_plus"])
def test_job_output_equals_that_in_memory(method, base, tmp_path, monkeypatch):
    """Result, files and weights, and the weights rebuilt from the plan."""
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    results, folders = [], []
    words = [f"merge={method}", "merge.target_layers=3", "merge.save_at=[5,3]", *QUICK]
    for weights in ("memory", "disk"):
        folders.append(tmp_path / weights)
        results.append(run_job(base, folders[-1], *words, f"model.weights={weights}"))
    memory, disk = results
    assert disk["job"] == memory["job"]
    assert disk["plan"] == memory["plan"]
    assert [r["metrics"] for r in disk["depths"]] == [r["metrics"] for r in memory["depths"]]
    for name in ("model", "model-5"):
        first, second = (folder / name for folder in folders)
        names = {path.name for path in first.iterdir()}
        assert {path.name for path in second.iterdir()} == names
        for file in names - {"come", "README.md", "model.safetensors"}:
            assert (second / file).read_bytes() == (first / file).read_bytes(), file
        one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list(folders[1].glob("weights-*"))
    rebuilt = apply(Plan.load(folders[0] / "plan.json"), load_weights(base, weights="disk"))
    own = load_file(folders[0] / "model" / "model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in all_tensors(rebuilt).items())


def test_bfloat16_checkpoints_with_float32_computation(windows, tmp_path):
    model = pico("llama_gqa").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = [
        compress(
            load_weights(tmp_path, dtype="float32", weights=weights),
            windows, recipe("come_plus"), target_layers=TARGET, progress=False,
        ).hash
        for weights in ("memory", "disk")
    ]  # fmt: skip
    assert found[0] == found[1]


def test_tensor_names_without_the_base_model_prefix(windows, tmp_path):
    """Some hub checkpoints were saved from the base model, without the head."""
    model = pico("llama_tied")
    model.model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "embed_tokens.weight" in file.keys()
    loaded = load_weights(tmp_path, weights="disk")
    assert perplexity(loaded, windows, progress=False) == perplexity(model, windows, progress=False)


def broken(folder, change):
    """Writes a checkpoint with changed tensors."""
    pico("llama_gqa").save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


KEY = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(KEY), f"missing keys: {KEY}"),
        (lambda tensors: tensors.update({KEY: torch.ones(2, 2)}), f"mismatched keys: {KEY}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "unexpected keys: extra"),
    ],
)
def test_weights_that_do_not_match_the_config(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_weights(broken(tmp_path, change), weights="disk")


def test_non_finite_weights_are_an_error(windows, tmp_path):
    folder = broken(tmp_path, lambda tensors: tensors[KEY].fill_(torch.nan))
    model = load_weights(folder, weights="disk")
    with pytest.raises(ValueError, match=f"weights {KEY} are not finite"):
        perplexity(model, windows, progress=False)


def test_auto_uses_disk_above_two_thirds_of_free_memory(tmp_path, monkeypatch):
    pico("llama_gqa").save_pretrained(tmp_path)
    shape, cpu = inspect_model(tmp_path), torch.device("cpu")

    def free(share):
        available = type("Memory", (), {"available": shape.weight_bytes / share})
        monkeypatch.setattr("psutil.virtual_memory", available)

    free(0.6)
    assert choose_weights("auto", shape, cpu) == "memory"
    free(0.7)
    assert choose_weights("auto", shape, cpu) == "disk"
    assert choose_weights("memory", shape, cpu) == "memory"
    with pytest.raises(ValueError, match="model.weights='ram': allowed are auto, memory, disk"):
        choose_weights("ram", shape, cpu)


def test_distillation_requires_weights_in_memory(command_line):
    code, printed = command_line("model.weights=disk", "distill=come_sp")
    assert code == 1
    assert "model.weights=disk: distill=come_sp trains a model in memory" in printed


def test_at_most_one_trial_is_in_memory(windows, monkeypatch):
    """Of the candidates evaluated together, only hidden states stay in memory."""
    alive, tried = [], []
    fit, split = trial_kl.fitted_trial, Adaptive.trial_split

    def fitted(group, units, refit):
        route = fit(group, units, refit)
        alive.extend(weakref.ref(each) for each in (group, units, route[0][1]))
        return route

    def trial_split(rule, group):
        gc.collect()
        tried.append([ref() is None for ref in alive])
        return split(rule, group)

    monkeypatch.setattr(trial_kl, "fitted_trial", fitted)
    monkeypatch.setattr(Adaptive, "trial_split", trial_split)
    method = recipe("come_plus", m=2)
    compress(on_disk(pico("llama_gqa")), windows, method, target_layers=LAYERS - 1, progress=False)
    assert len(tried) > 3
    assert all(all(freed) for freed in tried)


@torch.no_grad()
def test_release_frees_the_layer_that_was_read_ahead(windows):
    model = on_disk(pico("llama_gqa"))
    adapter, disk = ModelAdapter(model), layers_on_disk(model)
    states, keywords = adapter.layer_inputs(windows)
    for index in (0, 1):
        states = adapter.layer(index)(states, **keywords[index])
    _, reading = disk._prefetched
    read = weakref.ref(next(iter(reading.result().values())))
    del reading
    adapter.release()
    gc.collect()
    assert read() is None
    assert all(p.is_meta for layer in adapter.layers for p in layer.parameters())


def test_job_reads_layers_from_disk(base, tmp_path, private_caches):
    model = prepare_job(base, tmp_path / "out", "model.weights=disk").load()
    assert layers_on_disk(model) is not None
    adapter = ModelAdapter(model)
    adapter.write(1, {name: 2 * tensor for name, tensor in adapter.layer_state(1).items()})
    assert list((tmp_path / "out").glob("weights-*/*"))
