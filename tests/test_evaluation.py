"""Perplexity and speed against plain computations."""

import math
import sys
import time

import pytest
import torch
from scipy import stats

from come.data.windows import TokenWindows
from come.evaluate.dense import evaluate_dense
from come.evaluate.perplexity import Perplexity, perplexity
from come.evaluate.speed import Speed, Timing, compare_speed
from come.job.stages.evaluate import _speed
from come.memory import PeakMemory
from come.models.loading import load_tokenizer
from tests.conftest import pico


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_perplexity_is_exp_of_the_mean_cross_entropy(family, windows, batch_tokens):
    model = pico(family)
    found = perplexity(model, windows, batch_tokens=batch_tokens, progress=False)
    logits = model.double()(windows).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert found.nll == pytest.approx(nll.mean(1).tolist(), rel=1e-4)
    assert found.interval.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert found.tokens == windows.numel()
    assert found.predicted == nll.numel()


def test_intervals_are_students_over_windows():
    dense = Perplexity((1.0, 1.2, 1.1, 1.5), 0, 0)
    merged = Perplexity((1.3, 1.4, 1.5, 1.8), 0, 0)
    low, high = stats.t.interval(0.95, 3, loc=1.2, scale=stats.sem([1.0, 1.2, 1.1, 1.5]))
    assert (dense.interval.low, dense.interval.high) == pytest.approx(
        (math.exp(low), math.exp(high))
    )
    difference = [0.3, 0.2, 0.4, 0.3]
    low, high = stats.t.interval(0.95, 3, loc=0.3, scale=stats.sem(difference))
    ratio = merged.ratio_to(dense)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (math.exp(0.3), math.exp(low), math.exp(high))
    )
    assert Perplexity((1.0,), 0, 0).interval.high == math.inf


def test_windows_of_very_different_losses_have_finite_intervals():
    """exp is taken last, and no further than floats go."""
    far = Perplexity((2.0, 900.0), 0, 0)
    low, high = stats.t.interval(0.95, 1, loc=451, scale=449)
    assert far.interval.value == pytest.approx(math.exp(451))
    assert far.interval.high == sys.float_info.max < math.inf
    assert far.interval.low == pytest.approx(math.exp(low))
    assert high > 710
    assert far.ratio_to(far).high == 1
    assert Perplexity((2000.0, 2000.0), 0, 0).interval.value == sys.float_info.max


def test_speed_counts_every_turn():
    models = {"dense": pico("llama_gqa"), "model": pico("llama_gqa", num_hidden_layers=3)}
    speeds = compare_speed(models, prompt_tokens=32, new_tokens=4, repeats=3, progress=False)
    for speed in speeds.values():
        assert len(speed.prompt.seconds) == len(speed.generation.seconds) == 3
        assert speed.prompt.tokens == 32
        assert speed.generation.tokens == 4
        assert speed.peak_bytes > 0
    # keys and values of 32 tokens, 2 heads of 8, float32, a layer
    assert [speed.cache_bytes for speed in speeds.values()] == [6 * 4096, 3 * 4096]
    timing = Timing(10, (1.0, 4.0, 2.0))
    assert timing.tokens_per_second == 5
    assert timing.spread == (2.5, 10)


def test_equal_models_have_equal_peaks():
    """Whichever of them runs first."""
    models = {"one": pico("llama_gqa"), "two": pico("llama_gqa")}
    speeds = compare_speed(models, prompt_tokens=64, new_tokens=4, repeats=1, progress=False)
    one, two = (speed.peak_bytes for speed in speeds.values())
    weights = sum(p.numel() * 4 for p in models["one"].parameters())
    assert one == two
    assert one > weights + 2 * 64 * 32 * 4  # at least two states of the prompt


def test_peak_memory_sees_what_is_gone_again():
    with PeakMemory() as memory:
        block = torch.ones(64, 2**20)
        time.sleep(0.1)
        del block
    assert 250e6 < memory.peak < 400e6


@pytest.mark.parametrize(
    ("seconds", "gone", "ratio", "realised"),
    [((8.0, 4.0, 4.0), 0.25, 1.25, 0.8), ((5.0, 5.0), 0.2, 1.0, 0.0), ((2.0,), 0.5, 2.5, 1.2)],
)
def test_the_share_of_the_ideal_that_speed_realises(seconds, gone, ratio, realised):
    """Share of the dense model's time that is saved, over the share of its layers that is gone."""
    dense = Speed(Timing(10, (5.0,)), Timing(20, (40.0, 20.0, 30.0)), 7, 3)
    own = Speed(Timing(10, seconds), Timing(20, (24.0,)), 5, 2)
    found = _speed(own, dense, gone)
    assert found["prompt_ratio"] == pytest.approx(ratio)
    assert found["prompt_realised"] == pytest.approx(realised)
    assert found["generation"] == pytest.approx(20 / 24)
    assert found["generation_ratio"] == pytest.approx(30 / 24)
    assert found["generation_realised"] == pytest.approx((1 - 24 / 30) / gone)
    assert found["prompt_spread"] == [10 / max(seconds), 10 / min(seconds)]
    assert (found["peak_bytes"], found["cache_bytes"]) == (5, 2)
    assert _speed(dense, dense, 0.0)["prompt_realised"] == 0


def test_the_dense_cache_is_keyed_by_all_that_a_number_depends_on(
    windows, pico_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("COME_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(pico_folder)
    text = TokenWindows(windows, windows.numel(), "text")
    loads = []

    def measure(**changes):
        how = {
            "identity": "a",
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "batch_tokens": 16,
            "new_tokens": 0,
        } | changes
        found = how.pop("texts", {"": text})
        return evaluate_dense(lambda: loads.append(1) or pico("llama_gqa"), tokenizer, found, **how)

    first = measure()
    assert measure() == first
    assert len(loads) == 1
    for changes in (
        {"identity": "b"},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
        {"batch_tokens": 32},
        {"new_tokens": 2},
        {"texts": {"": TokenWindows(windows.flip(0), windows.numel(), "text")}},
        {"texts": {"": text, "more": text}},
    ):
        before = len(loads)
        measure(**changes)
        assert len(loads) == before + 1, changes
    monkeypatch.setattr("come.evaluate.dense.package_hash", lambda: "other code")
    measure()
    assert len(loads) == 9
