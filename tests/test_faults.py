"""Damaged and foreign files, full disks, and fuzzing: one line or the same result, never more."""

import errno
import json
import os
import pickle
import random
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from come.cli import _guarded, _printed
from come.data.sampling import cached
from come.data.windows import TokenWindows
from come.distill.progress import STATE, Progress, load_progress, save_progress
from come.evaluate.base import Metric, read_metrics
from come.evaluate.tasks import _AnyTag
from come.files import PARTIAL, read_again, read_object, write_text
from come.job.folder import PARTIAL_PLAN, finished_result, partial_plan, remove_partial
from come.job.stages.evaluate import MetricCache
from come.merge.apply import apply
from come.merge.loop import compress
from come.merge.plan import Plan, SolvedTensors
from come.merge.trial_scores import TrialScores
from come.models.checkpoint import fingerprint, weight_files
from come.models.loading import inspect_model
from come.report.grid import read_grid
from come.report.pair import _read
from tests.bases import edit_json, save_base
from tests.commands import ROOT, load_script
from tests.conftest import LAYERS, pico
from tests.jobs import run_job
from tests.methods import paper

mutate = load_script("faults/mutate")
DAMAGED = ["", "{", "[]", "null", '{"job": "j"}', '{"job": "j", "scores": 3}', "[" * 100_000]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan with solved tensors, saved, as JSON and as an object."""
    windows = torch.randint(3, 300, (5, 16), generator=torch.Generator().manual_seed(7))
    folder = tmp_path_factory.mktemp("plan")
    method = paper(refit="ridge")
    plan = compress(pico("llama_gqa"), windows, method, target_layers=LAYERS - 2, progress=False)
    plan.save(folder / "plan.json")
    return folder, json.loads((folder / "plan.json").read_text()), plan


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_files_of_a_job_are_not_used(text, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    for name in (PARTIAL_PLAN, "scores", "metrics", STATE, "result.json"):
        (tmp_path / name).write_text(text)
    assert partial_plan(tmp_path, "j") is None
    assert TrialScores(tmp_path / "scores", "j").scores == {}
    assert MetricCache(tmp_path / "metrics", "j").metrics == {}
    assert load_progress(tmp_path, "j", {"w": nn.Parameter(torch.zeros(2))}) is None
    if text != '{"job": "j", "scores": 3}':
        assert finished_result(tmp_path, "j") is None
    assert caplog.text.count("is damaged and is not used") >= 4
    assert not caplog.text.count("\nTraceback")


def test_missing_files_are_not_reported(tmp_path, caplog):
    assert read_again(tmp_path / "x", read_object) is None
    assert not caplog.text


def test_result_of_another_job_is_refused_and_kept(tmp_path):
    write_text(tmp_path / "result.json", '{"job": "other"}')
    with pytest.raises(ValueError, match="holds the result of another job"):
        finished_result(tmp_path, "j")
    assert (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("folder", ["../victim", "/victim", "model/../..", "", "model-x"])
def test_result_names_no_folder_outside_of_the_job(folder, tmp_path):
    depth = {"folder": folder, "layers": 1, "metrics": {}}
    result = {"job": "j", "settings": {"merge": {"save_weights": False}}, "depths": [{}, depth]}
    write_text(tmp_path / "result.json", json.dumps(result))
    assert finished_result(tmp_path, "j") is None
    depth["folder"] = "model-27"
    write_text(tmp_path / "result.json", json.dumps(result))
    assert finished_result(tmp_path, "j") == result


def test_truncated_model_of_a_finished_job_is_made_again(base, tmp_path, private_caches):
    folder = tmp_path / "run"
    first = run_job(base, folder, "eval=none")
    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    (folder / "model.partial").mkdir()
    (folder / f"plan.json.123{PARTIAL}").write_text("half")
    assert run_job(base, folder, "eval=none")["plan"] == first["plan"]
    assert weights.read_bytes() == whole
    assert not list(folder.rglob(f"*{PARTIAL}"))


def test_a_distilled_model_that_is_made_again_keeps_the_cost_of_its_merge(
    base, tmp_path, private_caches
):
    words = ("distill=logits", "distill.tokens=64", "distill.seq_len=16", "distill.batch_size=2",
             "distill.validation_samples=2", "eval=none")  # fmt: skip
    first = run_job(base, tmp_path, *words)["compression"]
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert run_job(base, tmp_path, *words)["compression"] == first
    assert first["boundary_bytes"] > 0
    assert weights.read_bytes() == whole


def test_remove_partial_leaves_everything_else(tmp_path):
    (tmp_path / "distill" / f"a{PARTIAL}").mkdir(parents=True)
    (tmp_path / f"x.json.1{PARTIAL}").write_text("")
    (tmp_path / "x.json").write_text("{}")
    remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["distill", "x.json"]


def test_damaged_caches_are_filled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    made = TokenWindows(torch.arange(8).view(2, 4), corpus_tokens=8, source="s", removed_lines=0)
    expected = cached(["k"], lambda: made).windows
    for path in (tmp_path / "cache" / "generated").iterdir():
        path.write_bytes(path.read_bytes()[:10])
        assert torch.equal(cached(["k"], lambda: made).windows, expected)
    base = save_base(tmp_path / "base", "llama_gqa")
    known = fingerprint(base)
    for path in (tmp_path / "cache" / "hashes").iterdir():
        path.write_text("0123")
    assert fingerprint(base) == known


def test_checkpoint_of_a_training_is_checked_before_it_is_restored(tmp_path, caplog):
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    save_progress(tmp_path, "j", Progress(step=1), {"w": weight}, {}, optimizer)
    other = nn.Parameter(torch.zeros(3, 3))
    assert load_progress(tmp_path, "j", {"w": other}) is None
    assert torch.equal(other, torch.zeros(3, 3))
    edit_json(tmp_path / STATE, tensors="../step-0000001.safetensors")
    assert load_progress(tmp_path, "j", {"w": weight}) is None
    assert "is no file of a checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["steps"][0].update(first=-1), "steps[0].first must be a whole number"),
        (lambda d: d["steps"][0].update(last=99), "steps[0].last must be a whole number"),
        (lambda d: d["steps"][0]["kept"]["channel"][0].append(10**9), "steps[0].kept.channel"),
        (lambda d: d["steps"][0]["kept"]["channel"].__setitem__(0, []), "24 units in all"),
        (lambda d: d["steps"][0].update(shares=[float("nan"), 1.0]), "must be a finite number"),
        (lambda d: d["steps"][0].update(solved={"../x": "0"}), "must be the name of a tensor"),
        (lambda d: d["base"].update(num_layers=10**9), "base.num_layers must be"),
        (lambda d: d["provenance"].update(recipe=3), "provenance.recipe must be dict"),
        (lambda d: d["provenance"].update(calibration={"source": 1}), "calibration.source"),
        (lambda d: d.update(downstream={"99/mlp.down_proj.weight": "0"}), "with a layer below"),
        (lambda d: d.update(norms="x" * 500), "norms must be mean or fold or none"),
    ],
)
def test_plan_names_the_field_that_is_wrong(change, message, planned, tmp_path):
    _, data, _ = planned
    data = json.loads(json.dumps(data))
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"merge.plan={path}: a field is missing or invalid")
    assert len(str(error.value)) < 400


def test_solved_tensors_fit_the_layer(planned, tmp_path):
    _, data, plan = planned
    (name, tensor), *_ = plan.steps[0].solved.tensors.items()
    data = json.loads(json.dumps(data))
    for own, message in (
        ({name: tensor[:1].clone()}, "has the shape"),
        ({name: tensor.long()}, "has the shape"),
        ({name: torch.tensor(1.0)}, "has the shape"),
        ({"mlp.nosuch.weight": tensor.clone()}, "which the layer does not have"),
    ):
        solved = plan.steps[0].solved.tensors | own
        rest = {f"1/{key}": value for key, value in plan.steps[1].solved.tensors.items()}
        save_file({f"0/{k}": v for k, v in solved.items()} | rest, tmp_path / "refit.safetensors")
        data["steps"][0]["solved"] = SolvedTensors(solved).hashes
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            apply(Plan.load(tmp_path / "plan.json"), pico("llama_gqa"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_fuzzed_plans_load_or_are_refused(seed, planned):
    folder, data, _ = planned
    path = folder / "fuzzed" / "plan.json"
    path.parent.mkdir(exist_ok=True)
    (path.parent / "refit.safetensors").write_bytes((folder / "refit.safetensors").read_bytes())
    path.write_text(mutate.text(data, random.Random(seed)))
    try:
        plan = Plan.load(path)
        if plan.base.num_layers == LAYERS:
            apply(plan, pico("llama_gqa"))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_fuzzed_results_are_read_or_left_out(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    metrics = {"perplexity": Metric(3.0, 2.0, 4.0, samples=[1.0, 1.2], headline=True).record()}
    depth = {"layers": 6, "parameters": 9, "sparsity": 0.0, "stage": "dense", "folder": ""}
    result = {
        "job": "j", "method": "come", "merge_history": [[0]],
        "depths": [{**depth, "metrics": metrics}, {**depth, "folder": "model", "metrics": metrics}],
        "compression": {"seconds": 1.0, "layer_passes": 1.0, "peak_bytes": 1},
        "settings": {"merge": {"save_weights": True}},
    }  # fmt: skip
    (folder / "result.json").write_text(mutate.text(result, random.Random(seed)))
    listing = {"folder": str(folder), "overrides": ["merge.m=2"]}
    (folder / "jobs.jsonl").write_text(json.dumps(listing) + "\n[]\nnull\n")
    rows, missing = read_grid(folder)
    assert len(rows) + len(missing) == 1
    try:
        finished_result(folder, "j")
        _read(folder)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("value", [None, "1", [1], {}, 10**400])
def test_metrics_are_numbers(value):
    with pytest.raises((ValueError, TypeError)):
        read_metrics({"x": {"value": value}})
    with pytest.raises((ValueError, TypeError)):
        read_metrics({"x": {"value": 1.0, "samples": [value]}})
    if value is not None:
        with pytest.raises((ValueError, TypeError)):
            read_metrics({"x": {"value": 1.0, "low": value, "relative": {"value": 1.0, "low": 1}}})


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors"])
def test_checkpoint_names_no_weights_outside_of_its_folder(name, base):
    edit_json(base / "config.json", transformers_weights=name)
    with pytest.raises(ValueError, match="names weights outside of it"):
        weight_files(base)
    edit_json(base / "config.json", "transformers_weights")
    (base / "model.safetensors").unlink()
    edit_json(base / "model.safetensors.index.json", weight_map={"x": name})
    with pytest.raises(ValueError, match="names weights outside of it"):
        weight_files(base)


def test_configuration_of_a_billion_layers_is_refused_at_once(base):
    edit_json(base / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000, and at most 10000"):
        inspect_model(base)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "output: No space left on device"),
        (OSError(errno.ENOSPC, "full", "a", None, "b"), "b: full"),
        (MemoryError(), "out of memory; calibration.memory=SIZE"),
        (ImportError("a.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("can't start new thread"), "out of memory"),
        (SystemError("error return without exception set"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory"),
    ],
)
def test_full_disk_and_full_memory_are_one_line(error, line, capsys):
    _printed.clear()

    def job():
        raise error

    assert _guarded(job) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1
    _printed.clear()
    with pytest.raises(RuntimeError, match="another"):
        _guarded(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_an_error_while_an_interrupt_is_handled_is_an_interrupt(capsys):
    def job():
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("a library that cleans up")

    assert _guarded(job) == 130
    assert capsys.readouterr().err == "interrupted; run the same command to resume\n"


PICKLES = re.compile(
    r"\b(import|from) (pickle|dill|cloudpickle|marshal|shelve)\b|torch\.(load|save)\(|joblib\.load|"
    r"allow_pickle=True|weights_only=False|yaml\.(unsafe_)?load\((?!.*(BaseLoader|_AnyTag))|\b(eval|exec)\("
)


def test_the_package_reads_no_pickle():
    for path in sorted((ROOT / "come").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            called = re.sub(r"\.eval\(", "(", line)
            assert not PICKLES.search(called), f"{path}:{number}: {line}"
    assert PICKLES.search("model = torch.load(path)")
    assert issubclass(_AnyTag, yaml.SafeLoader)


class Poison:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_poisoned_files_are_not_unpickled(base, tmp_path):
    poison = pickle.dumps(Poison(tmp_path / "ran"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (base / name).write_bytes(poison)
    inspect_model(base)
    (base / "model.safetensors").write_bytes(poison)
    with pytest.raises(ValueError, match="truncated or damaged"):
        inspect_model(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has only pickles"):
        inspect_model(base)
    (tmp_path / STATE).write_bytes(poison)
    assert load_progress(tmp_path, "j", {}) is None
    assert not (tmp_path / "ran").exists()


def test_tokens_are_in_no_file_of_a_run(base, tmp_path, private_caches, monkeypatch):
    secret = "hf_aVerySecretToken0123456789"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_TOKEN"):
        monkeypatch.setenv(name, secret)
    (base / "LICENSE").write_text("licence of the base")
    run_job(base, tmp_path / "run", "eval=none")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
    assert (tmp_path / "run" / "model" / "LICENSE").read_text() == "licence of the base"
    card = " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
    assert "The licence is that of the base model" in card
