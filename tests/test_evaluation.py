"""Perplexity, speed and continuations; caching and resuming of evaluations."""

import math
import sys
import time

import pytest
import torch
from scipy import stats

from come.data.windows import TokenWindows
from come.evaluate import speed
from come.evaluate.base import EVALUATIONS, Evaluation, Metric, Relative, Subject
from come.evaluate.continuations import Continuations, generate_greedily
from come.evaluate.dense import evaluate_dense
from come.evaluate.paired import exp_interval
from come.evaluate.perplexity import Perplexity, perplexity
from come.evaluate.speed import ModelSpeed, Speed, Timing, _metrics, compare_speed
from come.evaluate.zero_shot import _task_metrics
from come.job.stages.evaluate import MetricCache
from come.memory import PeakMemory
from come.models.loading import load_tokenizer, load_weights
from tests.bases import save_base
from tests.commands import ROOT
from tests.conftest import pico
from tests.jobs import run_job


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_perplexity_is_exp_of_the_mean_cross_entropy(family, windows, batch_tokens):
    model = pico(family)
    found = perplexity(model, windows, batch_tokens=batch_tokens, progress=False)
    logits = model.double()(windows).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert found.samples == pytest.approx(nll.mean(1).tolist(), rel=1e-4)
    assert found.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert found.data == f"{windows.numel()} tokens in {len(windows)} windows"


def test_intervals_are_student_t_over_windows():
    dense, merged = exp_interval([1.0, 1.2, 1.1, 1.5]), [1.3, 1.4, 1.5, 1.8]
    low, high = stats.t.interval(0.95, 3, loc=1.2, scale=stats.sem([1.0, 1.2, 1.1, 1.5]))
    assert (dense.low, dense.high) == pytest.approx((math.exp(low), math.exp(high)))
    difference = [0.3, 0.2, 0.4, 0.3]
    low, high = stats.t.interval(0.95, 3, loc=0.3, scale=stats.sem(difference))
    own = Metric(1.0, comparison="ratio", samples=merged)
    ratio = own.against(Metric(1.0, comparison="ratio", samples=[1.0, 1.2, 1.1, 1.5]))
    assert str(ratio).startswith("1.35 [1.")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (math.exp(0.3), math.exp(low), math.exp(high))
    )
    assert exp_interval([1.0]).high == math.inf


def test_large_losses_have_finite_intervals():
    """exp is applied last and clipped to the float range."""
    far = exp_interval([2.0, 900.0])
    low, high = stats.t.interval(0.95, 1, loc=451, scale=449)
    assert far.value == pytest.approx(math.exp(451))
    assert far.high == sys.float_info.max < math.inf
    assert far.low == pytest.approx(math.exp(low))
    assert high > 710
    assert exp_interval([2000.0, 2000.0]).value == sys.float_info.max


def test_speed_records_every_repeat():
    models = {"dense": pico("llama_gqa"), "model": pico("llama_gqa", num_hidden_layers=3)}
    speeds = compare_speed(models, prompt_tokens=32, new_tokens=4, repeats=3, progress=False)
    for found in speeds.values():
        assert len(found.prompt.seconds) == len(found.generation.seconds) == 3
        assert found.prompt.tokens == 32
        assert found.generation.tokens == 4
        assert found.peak_bytes > 0
    # per layer: keys and values of 32 tokens, 2 heads of 8, float32
    assert [found.cache_bytes for found in speeds.values()] == [6 * 4096, 3 * 4096]
    timing = Timing(10, (1.0, 4.0, 2.0))
    assert timing.tokens_per_second == 5
    assert timing.spread == (2.5, 10)


def test_equal_models_have_equal_peaks():
    """The order of the models does not matter."""
    models = {"one": pico("llama_gqa"), "two": pico("llama_gqa")}
    speeds = compare_speed(models, prompt_tokens=64, new_tokens=4, repeats=1, progress=False)
    one, two = (speed.peak_bytes for speed in speeds.values())
    weights = sum(p.numel() * 4 for p in models["one"].parameters())
    assert one == two
    assert one > weights + 2 * 64 * 32 * 4  # at least two hidden states of the prompt


def test_peak_memory_includes_freed_memory():
    with PeakMemory() as memory:
        block = torch.ones(64, 2**20)
        time.sleep(0.1)
        del block
    assert 250e6 < memory.peak < 400e6


@pytest.mark.parametrize(
    ("seconds", "removed", "ratio", "realised"),
    [((8.0, 4.0, 4.0), 0.25, 1.25, 0.8), ((5.0, 5.0), 0.2, 1.0, 0.0), ((2.0,), 0.5, 2.5, 1.2)],
)
def test_realised_share_of_the_ideal_speedup(seconds, removed, ratio, realised):
    """The saved share of the dense model's time, divided by the removed share of its layers."""
    dense = ModelSpeed(Timing(10, (5.0,)), Timing(20, (40.0, 20.0, 30.0)), 7, 3)
    own = ModelSpeed(Timing(10, seconds), Timing(20, (24.0,)), 5, 2)
    found = Speed.compare(_metrics(own), _metrics(dense), removed)
    prompt, generation = found["speed/prompt"], found["speed/generation"]
    assert prompt.relative.value == pytest.approx(ratio)
    assert prompt.details["realised"] == pytest.approx(realised)
    assert generation.value == pytest.approx(20 / 24)
    assert generation.relative.value == pytest.approx(30 / 24)
    assert generation.details["realised"] == pytest.approx((1 - 24 / 30) / removed)
    assert prompt.details["slowest"] == 10 / max(seconds)
    assert prompt.details["fastest"] == 10 / min(seconds)
    memory, cache = found["speed/peak_memory"], found["speed/kv_cache"]
    assert (memory.value, cache.value) == (5, 2)
    assert (memory.relative.value, cache.relative.value) == (5 / 7, 2 / 3)
    assert "realised" not in Speed.compare(_metrics(dense), _metrics(dense))["speed/prompt"].details


def test_dense_cache_key_covers_all_inputs(windows, pico_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "new" / "cache"))
    tokenizer = load_tokenizer(pico_folder)
    text = TokenWindows(windows, windows.numel(), "text")
    loads = []

    def measure(chosen=Perplexity, data=None, settings=None, **changes):
        options = {"identity": "a", "dtype": torch.float32, "device": torch.device("cpu")} | changes
        chosen = chosen(**(settings or {}))
        data = {"": text} if data is None else data
        load = lambda: loads.append(1) or pico("llama_gqa")  # noqa: E731
        return evaluate_dense(chosen, data, load, tokenizer, **options)

    first = measure()
    assert measure() == first
    assert len(loads) == 1
    for changes in (
        {"identity": "b"},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
        {"settings": {"batch_tokens": 32}},
        {"chosen": Continuations, "data": [[3, 4]], "settings": {"tokens": 2, "prompts": ["a"]}},
        {"data": {"": TokenWindows(windows.flip(0), windows.numel(), "text")}},
        {"data": {"": text, "more": text}},
    ):
        before = len(loads)
        measure(**changes)
        assert len(loads) == before + 1, changes
    monkeypatch.setattr("come.evaluate.dense.package_hash", lambda: "other code")
    measure()
    assert len(loads) == 9
    monkeypatch.setattr("come.evaluate.dense.file_hash", lambda path: "other code of a plugin")
    measure()
    assert len(loads) == 10


def test_significance_requires_interval_and_mcnemar():
    def metric(comparison, low, high, p=None):
        return Metric(1.0, comparison=comparison, relative=Relative(1.0, low, high, p))

    assert metric("ratio", 1.01, 1.1).significant
    assert not metric("ratio", 0.99, 1.1).significant
    assert metric("difference", 0.01, 0.1).significant
    assert metric("difference", -0.1, -0.01, 0.04).significant
    assert not metric("difference", -0.1, -0.01, 0.06).significant
    assert not metric("difference", -0.1, 0.01, 0.01).significant
    assert not metric("difference", None, None).significant
    assert not Metric(1.0).significant


def test_continuations_measure_agreement_before_the_first_difference():
    def metrics(*ids):
        return {"continuations": Metric(1.0, details={"ids": ids, "texts": {}})}

    own, dense = metrics([1, 2, 9, 4], [5, 6]), metrics([1, 2, 3, 4], [5, 6, 7, 8])
    assert Continuations.compare(own, dense)["continuations"].value == (0.5 + 0.5) / 2
    assert Continuations.compare(dense, dense)["continuations"].value == 1


def test_continuations_are_the_new_tokens(base):
    tokenizer, model = load_tokenizer(base), load_weights(base)
    evaluation = Continuations(prompts=["a prompt of some words", "b"], tokens=3)
    data = evaluation.prepare(Subject(tokenizer, len(tokenizer), None))
    found = evaluation.measure(model, tokenizer, data)["continuations"].details["ids"]
    for prompt, ids in zip(data, found, strict=True):
        assert len(ids) <= 3
        whole = generate_greedily(model, torch.tensor([prompt]), 3)[0].tolist()
        assert prompt + ids == whole


def test_windows_are_no_longer_than_the_context(base, text_file):
    tokenizer = load_tokenizer(base)
    subject = Subject(tokenizer, len(tokenizer), 48)
    for seq_len, expected in ((64, 48), (32, 32)):
        text = Perplexity(path=str(text_file), seq_len=seq_len).prepare(subject)[""]
        assert text.windows.shape[1] == expected


def test_task_intervals_cover_95_percent():
    samples = [{"doc_id": i, "acc": float(i % 2)} for i in range(4)]
    found = _task_metrics("a", {"acc,none": 0.5, "acc_stderr,none": 0.1}, samples)["zero_shot/a"]
    assert (found.low, found.high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-4)
    assert found.samples == [0.0, 1.0, 0.0, 1.0]
    assert found.data == "4 documents"


def test_gpu_timings_wait_for_the_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: calls.append("wait"))
    speed.seconds(pico("llama_gqa"), lambda: calls.append("work"))
    assert calls == ["wait", "work", "wait"]


def test_generation_does_not_stop_early(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "generate_greedily", lambda *args, **kw: seen.append((args, kw)))
    speed._generate(pico("llama_gqa"), 2, 5)
    (((_, ids, count), keywords),) = seen
    assert (len(ids), count, keywords) == (2, 5, {"least": 5})


def test_custom_evaluation_from_a_plugin_file(tmp_path, monkeypatch):
    """The example of docs/extend.md appears in result, report and model card."""
    monkeypatch.setattr(EVALUATIONS, "_entries", dict(EVALUATIONS._entries))
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    blocks = (ROOT / "docs" / "extend.md").read_text().split("```python\n")
    (code,) = [block.partition("```")[0] for block in blocks if "class Entropy(" in block]
    (tmp_path / "entropy.py").write_text(code)
    plugin = f"plugins=[{tmp_path / 'entropy.py'}]"
    base = save_base(tmp_path / "base", "llama_gqa")
    overrides = ("eval=[perplexity,entropy]", "eval.entropy.prompts=[a,b c,d]", plugin)
    result = run_job(base, tmp_path / "out", *overrides)
    dense, merged = (depth["metrics"]["entropy"] for depth in result["depths"])
    assert len(merged["samples"]) == 3
    assert merged["relative"]["value"] == pytest.approx(merged["value"] - dense["value"])
    assert merged["relative"]["low"] <= merged["relative"]["value"] <= merged["relative"]["high"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| entropy, nats | minus dense |" in report
    assert "| entropy, nats |" in (tmp_path / "out" / "model" / "README.md").read_text()
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 3
    with pytest.raises(ValueError, match="eval.entropy.prompt: eval=entropy has no such setting"):
        EVALUATIONS.create("entropy", {"prompt": ["a"]})


def test_interrupted_evaluation_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base", "llama_gqa")
    overrides = (
        "eval=[perplexity,speed,continuations]",
        "merge.target_layers=4",
        "merge.save_at=[5]",
    )
    calls, timing = [], Timing(10, (1.0,))
    monkeypatch.setattr(
        "come.evaluate.speed.compare_speed",
        lambda models, **options: dict.fromkeys(models, ModelSpeed(timing, timing, 1, 1)),
    )

    def counted(cls, name):
        whole = getattr(cls, name)

        def call(self, models, *args):
            calls.append(cls.__name__)
            if broken and len(calls) == 8:
                raise KeyboardInterrupt
            return whole(self, models, *args)

        monkeypatch.setattr(cls, name, call)

    counted(Perplexity, "measure")
    counted(Continuations, "measure")
    counted(Speed, "measure_together")
    broken = False
    whole = run_job(base, tmp_path / "whole", *overrides)
    assert len(calls) == 7  # two evaluations of three models, and one joint evaluation
    monkeypatch.setenv("COME_CACHE", str(tmp_path / "other cache"))
    broken = True
    calls.clear()
    calls.append("placeholder, so that the eighth call is the last Continuations.measure")
    with pytest.raises(KeyboardInterrupt):
        run_job(base, tmp_path / "out", *overrides)
    assert (tmp_path / "out" / "metrics.partial.json").is_file()
    broken = False
    calls.clear()
    resumed = run_job(base, tmp_path / "out", *overrides)
    assert calls == ["Continuations"]
    assert not (tmp_path / "out" / "metrics.partial.json").exists()
    for first, second in zip(whole["depths"], resumed["depths"], strict=True):
        for name in ("perplexity", "continuations"):
            assert first["metrics"][name] == second["metrics"][name]


def test_partial_metrics_of_another_job_are_ignored(tmp_path):
    path, calls = tmp_path / "metrics.partial.json", []

    def measure():
        calls.append(1)
        return {"model": {"perplexity": Metric(2.0, samples=[0.5])}}

    for job in ("one", "one", "other"):
        found = MetricCache(path, job).get("perplexity", ["model"], measure)
        assert found == {"model": {"perplexity": Metric(2.0, samples=[0.5])}}
    assert len(calls) == 2


def test_timed_generation_has_the_given_size(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "_generate", lambda model, *sizes: calls.append(sizes))
    monkeypatch.setattr(speed, "_peak_bytes", lambda model, work: [work(), 0][1])
    compare_speed(
        {"model": pico("llama_gqa")}, prompt_tokens=8, new_tokens=6, batch=4, repeats=2,
        progress=False,
    )  # fmt: skip
    assert calls == [(4, 4), *[(4, 6)] * 3]  # warm-up, its memory, two repetitions


@pytest.mark.parametrize(("new_tokens", "works"), [(9, 2), (8, 1)])
def test_memory_of_a_short_generation_is_not_measured(new_tokens, works, monkeypatch):
    """A prompt of 24 tokens needs as much as 16 + 8 tokens of a generation."""
    measured = []
    monkeypatch.setattr(speed, "_generate", lambda *sizes: None)
    monkeypatch.setattr(speed, "_peak_bytes", lambda model, work: measured.append(work) or 0)
    compare_speed(
        {"model": pico("llama_gqa")}, prompt_tokens=24, new_tokens=new_tokens, batch=1, repeats=1,
        progress=False,
    )  # fmt: skip
    assert len(measured) == works


def test_least_number_of_generated_tokens():
    model, ids = pico("llama_gqa"), torch.tensor([[3, 4, 5]])
    model.generation_config.eos_token_id = int(generate_greedily(model, ids, 1)[0, -1])
    assert generate_greedily(model, ids, 5).shape[1] == 4
    assert generate_greedily(model, ids, 5, least=5).shape[1] == 8


def test_metric_that_is_no_mean_of_its_scores():
    samples = [{"doc_id": i, "f1": float(i % 2)} for i in range(4)]
    assert _task_metrics("a", {"f1,none": 0.7}, samples)["zero_shot/a"].samples == []


def test_prompt_predicts_one_token():
    assert speed._prompt(pico("llama_gqa"), 8).logits.shape[:2] == (1, 1)


def test_models_are_measured_with_tokenizer_and_data():
    class Sizes(Evaluation):
        name = "sizes"

        def measure(self, model, tokenizer, data):
            return {"sizes": Metric(model + len(tokenizer) - len(data))}

    found = Sizes().measure_together({"dense": 1.0, "merged": 2.0}, "abc", [0, 0])
    assert {label: metrics["sizes"].value for label, metrics in found.items()} == {
        "dense": 2.0, "merged": 3.0,
    }  # fmt: skip
