"""`merge.budget`: candidate shapes, their costs, the search among them, and whole jobs."""

import copy
import importlib
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from come.cli.show import all_values
from come.evaluate.divergence import DenseReference
from come.job.dry_run import dry_run
from come.job.processes import processes
from come.job.stages.depth import searched_channels, shapes_within_budget
from come.merge.budget import (
    Budget,
    CandidateShape,
    candidate_shapes,
    validation_windows,
    widths,
    windows_for,
)
from come.merge.golden_section import find_minimum, lowest
from come.merge.shape_costs import LatencyShare, ParameterShare
from come.merge.width import kept_channels
from come.models.families import layout_of
from come.models.shape import ModelShape
from come.models.width import set_channels
from come.report.records import varying_keys
from tests.bases import save_base
from tests.conftest import LAYERS, SEQ, VOCAB, pico
from tests.decoders import DECODERS, pico_decoder
from tests.jobs import QUICK, job_settings, prepare_job, run_job
from tests.methods import come_plus

STAGE = importlib.import_module("come.job.stages.shape")
MERGE = importlib.import_module("come.job.stages.merge")
CHANNELS = 24
WORDS = ("merge.target_layers=null", "merge.width_multiple=4", *QUICK)
SMALLER = (*WORDS, "merge.budget.parameters=0.7")
TABLE = LatencyShare(1.0, {24: 2.0, 6: 1.0}, LAYERS, 24)

pytestmark = pytest.mark.usefixtures("private_caches")


def merge_of(base, *words):
    return job_settings(base, *WORDS, *words).merge


def counted(config, layers, channels):
    """The parameters of a model with another depth and width."""
    own = copy.deepcopy(config)
    set_channels(own, channels)
    own.num_hidden_layers = layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


# Candidates and their costs


@pytest.mark.parametrize("family", ["llama_tied", "llama_bias", "opt"])
def test_candidates_are_the_widest_shapes_within_the_budget(family):
    """Against the parameters of real models of every depth and width."""
    model = pico(family)
    shape = ModelShape.of(model, torch.float32)
    share = ParameterShare.of(shape, CHANNELS)
    total = sum(p.numel() for p in model.parameters())
    allowed = [24, 16, 8]
    real = {
        (layers, channels): counted(model.config, layers, channels)
        for layers in range(2, LAYERS + 1)
        for channels in allowed
    }
    assert {key: share.parameters(*key) for key in real} == real
    for most in (0.65, 0.7, 0.8, 0.95):
        best = {}
        for (layers, channels), count in real.items():
            if count <= most * total:
                best[layers] = max(best.get(layers, 0), channels)
        last = max((layers for layers, channels in best.items() if channels == 24), default=0)
        depths = range(2, LAYERS + 1)
        found = candidate_shapes(Budget(parameters=most), share, depths, CHANNELS, 8)
        assert [(own.layers, own.channels) for own in found] == [
            (layers, best[layers]) for layers in sorted(best, reverse=True) if layers >= last
        ]
        assert all(own.share == real[own.layers, own.channels] / total for own in found)


def test_narrowest_candidates():
    assert widths(24, 4) == [24, 20, 16, 12, 8]
    assert widths(1536, 512) == [1536, 1024, 512]
    assert widths(24, 64) == [24]
    assert widths(0, 64) == [0]


def test_layers_of_several_sizes_count_as_the_smallest_removed():
    share = ParameterShare(100, (10, 30, 20), 0, 0)
    assert [share.parameters(layers, 0) for layers in (3, 2, 1)] == [100, 90, 70]


def test_the_smallest_share_is_named_rounded_up():
    share = ParameterShare(1000, (100,) * 6, 24, 3)
    with pytest.raises(ValueError, match=r"parameters=0.4 cannot .* is 0.504 \(2 layers with 8 FF"):
        candidate_shapes(Budget(parameters=0.4), share, [5, 4, 3, 2], 24, 4)
    found = candidate_shapes(Budget(parameters=0.504), share, [5, 4, 3, 2], 24, 4)
    assert [str(own) for own in found] == ["2 layers with 8 FFN channels"]


@pytest.mark.parametrize(("full", "multiple"), [(40, 1), (1536, 64), (11008, 128)])
def test_the_width_of_a_candidate_keeps_its_channels(full, multiple):
    config = DECODERS["llama"]()
    config.intermediate_size = full
    layouts = layout_of(config).layers
    for channels in widths(full, multiple)[1:]:
        method = come_plus(width=channels / full, width_multiple=multiple)
        assert kept_channels(method, config, layouts) == channels


def test_windows_that_are_held_out():
    assert [validation_windows(n) for n in (2, 4, 5, 32, 100)] == [1, 1, 2, 8, 8]
    for fitted in range(1, 40):
        count = windows_for(fitted)
        assert count - validation_windows(count) >= fitted
        assert count - 1 - validation_windows(count - 1) < fitted


# The search


@pytest.mark.parametrize("count", range(1, 10))
def test_search_finds_the_lowest_of_nine_in_six_evaluations(count):
    """For every place of the minimum, and slopes of both kinds on each side."""
    for place, left, right in itertools.product(range(count), (0.1, 1, 5), (0.1, 1, 5)):
        table = [left * (place - i) if i < place else right * (i - place) for i in range(count)]
        calls = []

        def value(at, table=table, calls=calls):
            calls.append(at)
            return table[at]

        assert lowest(find_minimum(count, value)) == place
        assert len(calls) == len(set(calls)) <= 6
        assert {0, count - 1} <= set(calls)


def test_long_tables_are_searched_near_the_minimum():
    found = find_minimum(40, lambda at: abs(at - 27))
    assert len(found) == 6
    assert abs(lowest(found) - 27) <= 4


def test_divergence_of_a_model():
    """Against float64 log-probabilities, with batches of unequal size."""
    dense, other = pico("llama_gqa"), pico("llama_gqa", seed=1)
    other.lm_head.load_state_dict(dense.lm_head.state_dict())
    windows = torch.randint(3, VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(3))
    reference = DenseReference(dense, windows, 2)
    with torch.no_grad():
        p, q = (model(windows).logits.double().log_softmax(-1) for model in (dense, other))
    expected = 0.0
    for window in range(3):
        for token in range(SEQ):
            a, b = p[window, token], q[window, token]
            expected += float((a.exp() * (a - b)).sum()) / (3 * SEQ)
    assert reference.divergence(other) == pytest.approx(expected, rel=1e-5)
    assert reference.divergence(dense) < 1e-6
    other.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="predictions of a merged model are not finite"):
        reference.divergence(other)


# Settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge.budget.parameters=1",), r"merge.budget.parameters=1.0: must be a number above 0"),
        (("merge.budget.windows=0",), r"merge.budget.windows=0: must be a whole number of at"),
        (("merge.budget.latency=0.8",), r"both merge.budget.parameters=0.7 and merge.budget.lat"),
        (("merge.target_layers=5",), r"both merge.budget.parameters=0.7 and merge.target_layers=5"),
        (("merge.sparsity=0.2",), r"both merge.budget.* and merge.sparsity=0.2 are given; the"),
        (("merge.width=0.5",), r"both merge.budget.* and merge.width=0.5"),
        (("merge.save_at=[5]",), r"both merge.budget.* and merge.save_at=\[5\]"),
        (("merge.groups=[[0,1]]",), r"both merge.budget.* and merge.groups=\[\[0, 1\]\]"),
        (("merge.plan=x",), r"both merge.budget.* and merge.plan=x"),
        (("merge.sublayers=[ffn]",), r"merge.budget.* and merge.sublayers=\['ffn'\] keeps"),
        (("distill=come_sp",), r"merge.budget.parameters=0.7: distillation is for layers"),
        (("merge=none", "merge.width_multiple=64"), r"no effect with merge=none"),
    ],
)
def test_settings_that_are_refused(words, message, base):
    given = {word.partition("=")[0] for word in words}
    rest = [word for word in SMALLER if word.partition("=")[0] not in given]
    with pytest.raises(ValueError, match=message):
        job_settings(base, *rest, *words)


def test_windows_without_a_budget_are_refused(base):
    with pytest.raises(ValueError, match=r"merge.budget.windows has no effect with neither"):
        job_settings(base, "merge.budget.windows=4")


def test_jobs_that_are_refused_before_weights_are_loaded(base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"=0.1 cannot be reached .* the smallest share is 0.5"):
        prepare_job(base, tmp_path / "job", *WORDS, "merge.budget.parameters=0.1")
    with pytest.raises(ValueError, match="merge.m=9: a span has at least 2 layers"):
        prepare_job(base, tmp_path / "job", *SMALLER, "merge.m=9")
    with pytest.raises(ValueError, match=r"calibration.num_samples=1: .* needs at least 2 windows"):
        prepare_job(base, tmp_path / "job", *SMALLER, "calibration.num_samples=1")
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("come.job.processes.make_accelerator", lambda *args: two)
    with pytest.raises(ValueError, match=r"merge.budget.parameters=0.7: 2 processes were launched"):
        processes(job_settings(base, *SMALLER))


def test_budgets_are_shown(base, tmp_path):
    composed = job_settings(base, *SMALLER)
    shown = all_values(composed, "merge")
    assert "budget:\n  parameters: 0.7\n  latency: null\n  windows: 16" in shown
    assert "target_layers: null  # follows from the search for merge.budget.parameters=0.7" in shown
    assert composed.merge.counted()["budget"]["parameters"] == 0.7
    jobs = [{"merge.budget.parameters": "0.7"}, {"merge.budget.parameters": "0.8"}]
    assert varying_keys(jobs) == ["merge.budget.parameters"]


@pytest.mark.parametrize(
    ("model_type", "words", "channels"),
    [
        ("llama", (), 40),
        ("mixtral", (), 0),
        ("bloom", (), 0),
        ("llama", ("merge=shortgpt",), 0),
        ("llama", ("merge.refit=ridge", "merge.refit.downstream=0.1"), 0),
    ],
)
def test_methods_and_models_that_keep_their_width(model_type, words, channels, base):
    merge = merge_of(base, "merge.budget.parameters=0.9", *words)
    shape = ModelShape.of(pico_decoder(model_type), torch.float32)
    assert searched_channels(merge, shape) == channels
    (*narrower, last) = shapes_within_budget(merge, shape)
    assert last.width == 1
    assert bool(narrower) == bool(channels)


# Jobs


def test_a_job_within_a_share_of_the_parameters(tmp_path):
    base, out = save_base(tmp_path / "base", "llama_tied"), tmp_path / "out"
    result = run_job(base, out, *SMALLER)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    dense, merged = result["depths"]
    assert merged["parameters"] == sum(p.numel() for p in model.parameters())
    share = merged["parameters"] / dense["parameters"]
    assert 0.6 < share <= 0.7
    search = result["shape"]
    chosen = search["candidates"][search["chosen"]]
    assert chosen["share"] == share
    assert (chosen["layers"], chosen["channels"]) == (
        model.config.num_hidden_layers,
        model.config.intermediate_size,
    )
    tried = [own["kl"] for own in search["candidates"] if own["kl"] is not None]
    assert chosen["kl"] == min(tried)
    assert len(tried) == len(search["candidates"]) == 3
    report = (out / "report.md").read_text()
    assert "| layers | FFN channels | parameters / dense | KL of a trial, nats/token |" in report
    assert f"| **{chosen['layers']}** | **{chosen['channels']}** | **{share:.3f}** |" in report
    assert not list(out.glob("*.partial*"))


class Interrupt(Exception):
    """Raised in place of the end of a process."""


def test_a_resumed_job_repeats_no_trial(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "llama_tied")
    trial, tried = STAGE._trial, []

    def counted(job, shape, *rest):
        if len(tried) == 2:
            raise Interrupt
        tried.append(shape.layers)
        return trial(job, shape, *rest)

    def stop(*args):
        raise Interrupt

    out, log_step = tmp_path / "out", MERGE._log_step
    monkeypatch.setattr(STAGE, "_trial", counted)
    monkeypatch.setattr(MERGE, "_log_step", stop)
    with pytest.raises(Interrupt):
        run_job(base, out, *SMALLER)
    assert len(tried) == 2
    before = json.loads((out / "shape.partial.json").read_text())
    assert before["chosen"] is None
    tried.clear()
    with pytest.raises(Interrupt):  # during the first merge, after the third trial
        run_job(base, out, *SMALLER)
    assert len(tried) == 1
    saved = json.loads((out / "shape.partial.json").read_text())
    known = [own["kl"] for own in before["candidates"]]
    assert [a for a in known if a is not None] == [
        own["kl"] for own, a in zip(saved["candidates"], known, strict=True) if a is not None
    ]
    tried[:] = [None] * 2
    with pytest.raises(Interrupt):  # another job tries its own
        run_job(base, out, *SMALLER, "calibration.seed=1")
    monkeypatch.setattr(MERGE, "_log_step", log_step)
    (out / "shape.partial.json").write_text(json.dumps(saved))
    result = run_job(base, out, *SMALLER)
    assert result["shape"] == saved


def test_a_job_within_a_share_of_the_time(base, tmp_path, monkeypatch):
    """With given times of layers, whose candidates differ from the estimate's."""
    asked = []

    def measure(model, window, full):
        asked.append((model.config.num_hidden_layers, window.shape, full))
        return TABLE

    monkeypatch.setattr(STAGE, "measure_latency", measure)
    monkeypatch.setattr(STAGE, "_trial", lambda job, shape, *rest: shape)
    divergences = {6: 3.0, 5: 1.0, 4: 2.0}
    monkeypatch.setattr(
        STAGE.DenseReference, "divergence", lambda reference, shape: divergences[shape.layers]
    )
    result = run_job(base, tmp_path / "out", *WORDS, "merge.budget.latency=0.7")
    assert asked == [(6, (1, 32), 24)]
    found = [(own["layers"], own["channels"]) for own in result["shape"]["candidates"]]
    assert found == [(6, 12), (5, 16), (4, 24)]
    assert (result["shape"]["quantity"], result["shape"]["budget"]) == ("latency", 0.7)
    assert result["shape"]["chosen"] == 1
    assert result["depths"][1]["layers"] == 5
    assert "16 of 24" in (tmp_path / "out" / "report.md").read_text()


def test_drops_need_no_search(base, tmp_path, monkeypatch):
    monkeypatch.setattr(STAGE, "DenseReference", None)
    monkeypatch.setattr(STAGE, "measure_latency", lambda *args: LatencyShare(1.0, {0: 2.0}, 6, 0))
    drops = ("merge=shortgpt", "merge.target_layers=null", *QUICK)
    result = run_job(base, tmp_path / "time", *drops, "merge.budget.latency=0.7")
    assert result["depths"][1]["layers"] == 4
    monkeypatch.setattr(STAGE, "measure_latency", None)
    result = run_job(base, tmp_path / "size", *drops, "merge.budget.parameters=0.7")
    dense, merged = result["depths"]
    each = (dense["parameters"] - merged["parameters"]) / (6 - merged["layers"])
    assert merged["parameters"] <= 0.7 * dense["parameters"] < merged["parameters"] + each
    assert "| **0." in (tmp_path / "size" / "report.md").read_text()


def test_a_budget_of_time_out_of_reach(base, tmp_path, monkeypatch):
    monkeypatch.setattr(STAGE, "measure_latency", lambda *args: replace(TABLE, rest=100.0))
    with pytest.raises(ValueError, match=r"latency=0.2 cannot be reached .* share is 0\.\d+ \("):
        run_job(base, tmp_path / "out", *WORDS, "merge.budget.latency=0.2")


@pytest.mark.parametrize("quantity", ["parameters", "latency"])
def test_dry_run(quantity, base, tmp_path, monkeypatch):
    monkeypatch.setattr("come.job.job.load_weights", None)
    composed = job_settings(base, *WORDS, f"merge.budget.{quantity}=0.7")
    lines = dry_run(composed, tmp_path / "out")
    (shape,) = (line for line in lines if line.startswith("shape: "))
    assert "candidates, from " in shape
    assert ("a run measures their time" in shape) == (quantity == "latency")
    (search,) = (line for line in lines if line.startswith("search: "))
    assert "at most 6 trials, fitted to 6 windows and compared on 2 others: about " in search
    assert any("to the chosen shape, such as " in line for line in lines)


def test_the_method_of_a_trial(base, tmp_path):
    """The surrogate of the refit, and as many windows as the settings and the method ask."""
    words = ("merge=come_plus", *SMALLER, "calibration.num_samples=16", "merge.m=2")
    job = prepare_job(base, tmp_path / "job", *words)
    method = STAGE._trial_method(job, CandidateShape(5, 12, 0.5, 0.6))
    assert (method.refit.name, method.width, method.width_multiple) == ("ridge", 0.5, 4)
    assert STAGE._windows(job) == (12, 4)
    job = prepare_job(base, tmp_path / "job", *words, "merge.budget.windows=3")
    assert STAGE._windows(job) == (3, 4)
