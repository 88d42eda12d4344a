"""The merge and evaluation stages of a job: what is resumed, saved, loaded and measured."""

import importlib
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

from come.evaluate.perplexity import perplexity
from come.job.identity import job_hash
from come.job.sampled_text import sampled, sampling_key, with_samples
from come.merge.plan import BaseModel, Plan
from come.merge.saving import plan_path
from come.merge.selection import skip_loss, trial_kl
from come.models.adapter import ModelAdapter
from come.models.loading import load_tokenizer, load_weights
from tests.bases import save_base
from tests.commands import same_checkpoint
from tests.conftest import LAYERS, VOCAB, pico
from tests.jobs import QUICK, job_settings, prepare_job, run_job

STAGE = importlib.import_module("come.job.stages.merge")

pytestmark = pytest.mark.usefixtures("private_caches")


class Interrupt(Exception):
    """Raised in place of the end of a process."""


def interrupted_job(*arguments):
    """Runs a job up to its first merge."""

    def stop(*args):
        raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGE, "_log_step", stop)
        with pytest.raises(Interrupt):
            run_job(*arguments)


# The merge


def test_interrupted_merge_resumes_for_the_same_job_only(base, tmp_path):
    words = ("merge.target_layers=4", *QUICK)
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGE.time, "perf_counter", lambda: next(ticks) / 1e6)
        whole = run_job(base, tmp_path / "whole", *words)
    assert 0 < whole["compression"]["seconds"] < 0.5
    for again, resumed in ((), 1), (("calibration.seed=1",), 0):
        folder = tmp_path / f"stopped-{resumed}"
        interrupted_job(base, folder, *words)
        result = run_job(base, folder, *words, *again)
        assert result["compression"]["resumed_at"] == resumed
        plan = Plan.load(folder / "plan.json")
        same = plan.hash == Plan.load(tmp_path / "whole" / "plan.json").hash
        assert same == bool(resumed)
    assert whole["compression"]["resumed_at"] == 0


def test_resumed_merge_makes_a_damaged_model_of_a_passed_depth_again(base, tmp_path):
    words, folder = ("merge.target_layers=4", "merge.save_at=[5]", *QUICK), tmp_path / "out"
    for length, resumed in (None, 1), (-100, 0):
        interrupted_job(base, folder, *words)
        weights = folder / "model-5" / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:length])
        assert run_job(base, folder, *words)["compression"]["resumed_at"] == resumed
        assert weights.read_bytes() == whole
        (folder / "result.json").unlink()


def test_interrupted_merge_starts_again_for_other_weights(base, tmp_path, monkeypatch):
    """The fingerprint of the base model, for a job that has the same hash."""
    words = ("merge.target_layers=4", *QUICK)
    interrupted_job(base, tmp_path / "out", *words)
    monkeypatch.setattr(STAGE, "fingerprint", lambda checkpoint: "of other weights")
    result = run_job(base, tmp_path / "out", *words)
    assert result["compression"]["resumed_at"] == 0


def test_trial_merges_are_reused_by_the_same_job_only(base, tmp_path, monkeypatch):
    words = ("merge=come_plus", "merge.m=2", *QUICK)
    whole, tried = trial_kl.fitted_trial, []

    def counted(span, *rest):
        tried.append((span.first, span.last))
        if len(tried) == 3:
            raise Interrupt
        return whole(span, *rest)

    monkeypatch.setattr(trial_kl, "fitted_trial", counted)
    counts = []
    for number, again in enumerate([(), ("calibration.seed=1",)]):
        tried.clear()
        with pytest.raises(Interrupt):
            run_job(base, tmp_path / str(number), *words)
        tried[:] = [None] * 3
        run_job(base, tmp_path / str(number), *words, *again)
        counts.append(len(tried) - 3)
    assert counts[1] == counts[0] + 2


def test_separately_merged_depths(base, tmp_path):
    """UIDL drops one span, so each depth is a compression of the dense model."""
    run_job(base, tmp_path / "out", "merge=uidl", "merge.target_layers=4", "merge.save_at=[5]",
            *QUICK)  # fmt: skip
    for name, depth in ("model-5", 5), ("model", 4):
        plan = Plan.load(plan_path(tmp_path / "out" / name))
        assert (plan.num_layers, len(plan.steps)) == (depth, 1)
        assert load_weights(tmp_path / "out" / name).config.num_hidden_layers == depth


def test_separately_merged_depths_share_losses(base, tmp_path, monkeypatch):
    """A loss belongs to one set of layers; other depths take it from the job's file."""
    measured, losses = [], skip_loss.losses
    monkeypatch.setattr(
        skip_loss, "losses", lambda stream, some: measured.extend(some) or losses(stream, some)
    )
    words = ("merge=sleb_swap", "merge.schedule.rounds=0", "merge.target_layers=4")
    counts = []
    for name, depths in ("one", "[]"), ("two", "[5]"):
        measured.clear()
        run_job(base, tmp_path / name, *words, f"merge.save_at={depths}", *QUICK)
        counts.append(len(measured))
    assert counts == [6 + 5, 6 + 5]


def test_saved_model_belongs_to_the_job_in_its_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(STAGE, "check_checkpoint", lambda folder: None)
    base, job = BaseModel("base", "", "llama", 6, {}), SimpleNamespace(hash="this job")
    plan_path(tmp_path).parent.mkdir()
    assert not STAGE._saved_by_job(job, tmp_path)
    for name in ("this job", "another"):
        Plan(base, "concat", "fold", provenance={"job": name}).save(plan_path(tmp_path))
        assert STAGE._saved_by_job(job, tmp_path) == (name == job.hash)


def test_job_hash_depends_on_plan_and_plugin_code(base, tmp_path):
    hashes = []
    for target in (5, 4):
        run_job(base, tmp_path / str(target), f"merge.target_layers={target}", *QUICK)
        plan = f"merge.plan={tmp_path / str(target) / 'plan.json'}"
        words = ("merge=from_plan", plan, "merge.target_layers=null")
        hashes.append(job_hash(job_settings(base, *words)))
    plugin = tmp_path / "plugin.py"
    for code in ("", "x = 1\n"):
        plugin.write_text(code)
        hashes.append(job_hash(job_settings(base, f"plugins=[{plugin}]")))
    assert len(set(hashes)) == 4


# Sampled text


def test_cache_key_of_sampled_text(base, tmp_path):
    """It differs between models, dtypes, and settings of the sampling."""
    other = save_base(tmp_path / "other", "llama_gqa", seed=1)
    model = load_weights(base)

    def key(folder, *words, model=model, settings=()):
        job = prepare_job(folder, tmp_path / "out", "calibration=self_generated", *words)
        return str(sampling_key(job, model, settings))

    keys = [
        key(base), key(other), key(base, "calibration.temperature=0.5"),
        key(base, model=load_weights(base, dtype="bfloat16")), key(base, settings=[1]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(base) == keys[0]


SAMPLED = ("calibration=self_generated", "calibration.path=null")
CONTINUED = ("calibration.num_continuations=4", "calibration.prefix_tokens=4")


@pytest.mark.parametrize(("words", "changed"), [
    (SAMPLED, "calibration.seq_len=20"), (SAMPLED, "calibration.num_samples=3"),
    (SAMPLED, "calibration.keep_likeliest=0.5"), (CONTINUED, "calibration.seed=1"),
    (CONTINUED, "calibration.num_continuations=3"), (CONTINUED, "calibration.prefix_tokens=5"),
    (CONTINUED, "calibration.temperature=0.1"), (CONTINUED, "calibration.top_p=0.1"),
])  # fmt: skip
def test_settings_of_sampled_text(words, changed, base, text_file, tmp_path):
    """They reach the sampling, also after another job has filled the cache."""
    text = () if words == SAMPLED else (f"calibration.path={text_file}",)
    words = (*words, *text, "eval=none", "calibration.num_samples=4", "calibration.seq_len=16")
    model = load_weights(base)
    jobs = [prepare_job(base, tmp_path / "out", *words, *more) for more in ((), (changed,))]
    first, second, again = (with_samples(job, model).windows for job in (*jobs, jobs[0]))
    assert torch.equal(first, again)
    assert first.shape != second.shape or not torch.equal(first, second)
    key, _, value = changed.partition("=")
    if key == "calibration.seq_len":
        assert second.shape[1] == int(value)
    if key in ("calibration.temperature", "calibration.top_p"):
        changes = (first != second).any(dim=0).nonzero().flatten()
        assert int(changes[0]) >= 4  # the beginnings are the same text


# Evaluation


def test_every_depth_is_measured_on_its_own_model(base, tmp_path):
    """Perplexities are those of the saved models; the KV cache shrinks with the layers."""
    speed = ("eval.speed.prompt_tokens=8", "eval.speed.new_tokens=2", "eval.speed.repeats=1")
    result = run_job(
        base, tmp_path / "out", "merge.target_layers=4", "merge.save_at=[5]",
        "eval=[perplexity,speed]", *speed,
    )  # fmt: skip
    job = prepare_job(base, tmp_path / "again")
    windows = job.evaluations["perplexity"][1][""].windows
    folders = [base, tmp_path / "out" / "model-5", tmp_path / "out" / "model"]
    dense, five, four = result["depths"]
    for depth, folder in zip((dense, five, four), folders, strict=True):
        found = perplexity(load_weights(folder), windows, batch_tokens=2048, progress=False)
        assert depth["metrics"]["perplexity"]["samples"] == pytest.approx(found.samples)
    sizes = [depth["metrics"]["speed/kv_cache"]["value"] for depth in (dense, four)]
    assert sizes[0] * 4 == sizes[1] * LAYERS


def test_parameters_without_mlps(base, tmp_path):
    """Sizes of sublayers, for the target and in the result."""
    block = ModelAdapter(pico("llama_gqa")).block_parameters["ffn"]
    words = ("merge.sublayers=[ffn]", "eval=none")
    dense, merged = run_job(base, tmp_path / "out", *words, drawn=True)["depths"]
    assert (tmp_path / "out" / "puzzle.png").stat().st_size > 1000
    assert dense["parameters"] - merged["parameters"] == block
    assert merged["sparsity"] == pytest.approx(block / dense["parameters"])
    sparsity = 3 * block / dense["parameters"]
    job = prepare_job(
        base, tmp_path / "two", *words, "merge.target_layers=null", f"merge.sparsity={sparsity}"
    )
    assert job.target == LAYERS - 3


def test_a_merge_first_removes_the_changed_layers_of_a_killed_run(base, tmp_path, monkeypatch):
    words = ("merge.target_layers=5", *QUICK)
    left = tmp_path / "out" / "weights-abc.partial"
    left.mkdir(parents=True)
    compress, seen = STAGE.compress, []

    def watched(*arguments, **others):
        seen.append(left.exists())
        return compress(*arguments, **others)

    monkeypatch.setattr(STAGE, "compress", watched)
    run_job(base, tmp_path / "out", *words)
    assert seen == [False]


def test_cost_of_a_resumed_merge(base, tmp_path):
    words, path = ("merge.target_layers=4", *QUICK), tmp_path / "out" / "plan.partial.json"
    interrupted_job(base, tmp_path / "out", *words)
    plan = json.loads(path.read_text())
    plan["provenance"]["seconds"] = 1000.0
    path.write_text(json.dumps(plan))
    began = time.perf_counter()
    found = run_job(base, tmp_path / "out", *words)["compression"]
    assert 1000 < found["seconds"] < 1000 + time.perf_counter() - began
    assert found["layer_passes"] > 0


@pytest.mark.parametrize("changed", [
    "calibration.temperature=0.1", "calibration.top_p=0.1", "calibration.keep_likeliest=0.5",
])  # fmt: skip
def test_settings_of_sampled_training_text(changed, tmp_path):
    base = save_base(tmp_path / "base", "llama_gqa", vocab_size=2 * VOCAB)
    words = (
        *SAMPLED, "distill=come_sp", "distill.seq_len=12", "distill.validation_samples=2",
        "eval=none",
    )  # fmt: skip
    model = load_weights(base)
    first, second = (
        sampled(prepare_job(base, tmp_path / "out", *words, *more), model, 4).windows
        for more in ((), (changed,))
    )
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert int(first.max()) < len(load_tokenizer(base))


def test_plan_gives_the_same_models_at_every_depth(base, tmp_path):
    words = ("merge.target_layers=4", "merge.save_at=[5]", *QUICK)
    first = run_job(base, tmp_path / "out", *words)
    plan = ("merge=from_plan", f"merge.plan={tmp_path / 'out' / 'plan.json'}")
    again = run_job(base, tmp_path / "again", *plan, *words)
    for name in ("model", "model-5"):
        assert same_checkpoint(tmp_path / "again" / name, tmp_path / "out" / name)
    assert [d["layers"] for d in again["depths"]] == [d["layers"] for d in first["depths"]]
    cost = again["compression"]  # no hidden states are stored to apply a plan
    assert (cost["boundary_bytes"], cost["layer_passes"]) == (0, 0)
    with pytest.raises(ValueError, match="the plan passes through 5, 4"):
        prepare_job(base, tmp_path / "no", *plan, "merge.target_layers=4", "merge.save_at=[3]")
