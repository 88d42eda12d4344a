"""Agreement with the dense model's greedy tokens, against token-by-token loops in float64."""

import copy
import itertools
import math

import pytest
import torch

from come.data.windows import TokenWindows
from come.evaluate import agreement
from come.evaluate.agreement import Agreement, greedy_continuations, predicted
from come.evaluate.base import Metric, Subject
from come.evaluate.paired import paired_difference
from come.models.loading import load_tokenizer, load_weights
from come.report.pair import compare
from tests.conftest import VOCAB, pico
from tests.jobs import prepare_job, run_job, settings

NEW = 9
QUICK = (
    "eval=agreement", "eval.agreement.seq_len=32", "eval.agreement.prompt_tokens=8",
    "eval.agreement.new_tokens=6", "eval.agreement.max_tokens=320",
)  # fmt: skip


def perturbed(model, scale=0.015):
    """A copy with noise on every weight, which agrees with the model on some tokens."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


def next_token(model, ids):
    """The most likely next token, from a pass over the whole text without a cache."""
    with torch.no_grad():
        return int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_sliding", "opt"])
def test_equals_a_loop_over_tokens_in_float64(family, windows):
    dense = pico(family)
    other = perturbed(dense)
    found = greedy_continuations(dense, windows, NEW, batch_size=2, progress=False)
    same = predicted(other, windows, found, batch_size=3, progress=False)
    dense, other = dense.double(), other.double()
    for prompt, ids, row in zip(windows.tolist(), found, same, strict=True):
        for position, token in enumerate(ids):
            assert token == next_token(dense, prompt + ids[:position])
            assert row[position] == (next_token(other, prompt + ids[:position]) == token)
        assert len(row) == len(ids) == NEW or ids[-1] == 2
    flat = [hit for row in same for hit in row]
    assert 0 < sum(flat) < len(flat)


@pytest.mark.parametrize("listed", [False, True])
def test_tokens_after_the_end_of_sequence_are_not_counted(listed, windows):
    model = pico("llama_gqa")
    whole = greedy_continuations(model, windows, NEW, batch_size=5, progress=False)
    end = whole[0][3]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert len({len(ids) for ids in expected}) > 1
    model.generation_config.eos_token_id = [VOCAB - 1, end] if listed else end
    found = greedy_continuations(model, windows, NEW, batch_size=5, progress=False)
    assert found == expected
    same = predicted(model, windows, found, batch_size=2, progress=False)
    assert same == [[True] * len(ids) for ids in found]
    alone = greedy_continuations(model, windows[:1], NEW, batch_size=5, progress=False)
    assert alone == expected[:1]  # generation stops before NEW tokens


def test_padding_of_shorter_continuations_changes_nothing(windows):
    dense = pico("mistral_sliding")
    other = perturbed(dense)
    found = greedy_continuations(dense, windows, NEW, batch_size=5, progress=False)
    mixed = [ids[: 1 + 2 * i] for i, ids in enumerate(found)]
    whole = predicted(other, windows, found, batch_size=5, progress=False)
    cut = predicted(other, windows, mixed, batch_size=5, progress=False)
    assert cut == [row[: 1 + 2 * i] for i, row in enumerate(whole)]


def measured(windows, other=None):
    """Metrics of a dense model and of another one."""
    dense, data = pico("llama_gqa"), TokenWindows(windows, windows.numel(), "text")
    evaluation = Agreement(new_tokens=NEW)
    own = evaluation.measure(dense, None, data)
    other = perturbed(dense) if other is None else other(dense)
    return own, evaluation.measure_compressed(other, None, data, own)


@pytest.mark.parametrize("other", [lambda dense: dense, copy.deepcopy])
def test_the_same_model_agrees_on_every_token(other, windows):
    dense, own = measured(windows, other)
    for metrics in (dense, Agreement.compare(own, dense)):
        assert {(m.value, m.low, m.high) for m in metrics.values()} == {(1.0, 1.0, 1.0)}
    relative = Agreement.compare(own, dense)["agreement"].relative
    assert (relative.value, relative.low, relative.high, relative.p) == (0, 0, 0, 1)


def test_values_and_intervals_are_over_windows(windows, monkeypatch):
    rows = [[True, False, True, True], [True, True], [False, True, True, True], [True], [False] * 2]
    dense, _ = measured(windows)
    monkeypatch.setattr(agreement, "predicted", lambda *args, **options: rows)
    _, own = measured(windows)
    found, first = own["agreement"], own["agreement/before_first_difference"]
    assert found.samples == [0.75, 1, 0.75, 1, 0]
    assert first.samples == [0.25, 1, 0, 1, 0]
    assert (found.headline, first.headline) == (True, False)
    for metric in (found, first):
        resamples = sorted(sum(drawn) / 5 for drawn in itertools.product(metric.samples, repeat=5))
        assert metric.value == pytest.approx(sum(metric.samples) / 5)
        assert metric.low == pytest.approx(resamples[len(resamples) // 40], abs=0.051)
        assert metric.high == pytest.approx(resamples[-len(resamples) // 40], abs=0.051)
    assert found.data == f"{5 * NEW} tokens after 5 prompts of text"
    relative = Agreement.compare(own, dense)["agreement"].relative
    expected = paired_difference(found.samples, [1.0] * 5)
    assert (relative.low, relative.high, relative.p) == (expected.low, expected.high, expected.p)
    assert relative.value == pytest.approx(0.7 - 1)
    assert "ids" not in found.details


def test_other_continuations_are_not_compared(windows):
    _, own = measured(windows)
    other, _ = measured(windows.flip(0))
    with pytest.raises(ValueError, match="agreement was measured on other continuations"):
        Agreement.compare(own, other)


def test_logits_that_are_not_finite(windows):
    model = pico("llama_gqa")
    with torch.no_grad():
        model.lm_head.weight[7] = math.inf
    with pytest.raises(ValueError, match="windows 1 to 2 is not finite.* in torch.float32"):
        predicted(model, windows, [[3]] * 5, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"prompt_tokens": 33},
            "eval.agreement.prompt_tokens=33: a window has .*seq_len=32 tokens",
        ),
        (
            {"new_tokens": 41},
            "new_tokens=41 after 8 of a prompt: the model reads at most 48 tokens",
        ),
        (
            {"max_tokens": 40},
            r"two windows of eval.agreement.seq_len=32 .*raise eval.agreement.max",
        ),
        ({"text_range": [0.5]}, r"eval.agreement.text_range=\[0.5\]: two shares"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message, base, text_file):
    tokenizer = load_tokenizer(base)
    chosen = {"path": str(text_file), "seq_len": 32, "prompt_tokens": 8, "new_tokens": 6} | sizes
    subject = Subject(tokenizer, len(tokenizer), 48)

    def prepare():
        evaluation = Agreement(**chosen)
        evaluation.check()
        evaluation.prepare(subject)

    with pytest.raises(ValueError, match=message):
        prepare()


def test_prompts_begin_the_windows(base, text_file):
    tokenizer = load_tokenizer(base)
    chosen = {"path": str(text_file), "seq_len": 64, "new_tokens": 6}
    subject = Subject(tokenizer, len(tokenizer), 48, begin=1)
    whole = Agreement(**chosen, prompt_tokens=42).prepare(subject).windows
    some = Agreement(**chosen, prompt_tokens=8)
    found = some.prepare(subject)
    assert found.windows.equal(whole[:, :8])
    ids = tokenizer(text_file.read_text())["input_ids"]
    assert found.windows[:2].tolist() == [[1, *ids[:7]], [1, *ids[47:54]]]  # windows of 48
    assert some.key(found) == found.hash


@pytest.mark.usefixtures("private_caches")
def test_complete_job(base, tmp_path, monkeypatch):
    """The dense continuations are generated once for all jobs, also with weights on disk."""
    calls, whole = [], agreement.greedy_continuations
    monkeypatch.setattr(
        agreement, "greedy_continuations", lambda *a, **k: calls.append(a) or whole(*a, **k)
    )
    saved = (*QUICK, "merge.target_layers=4", "merge.save_at=[5]")
    result = run_job(base, tmp_path / "out", *saved)
    dense, first, second = (depth["metrics"]["agreement"] for depth in result["depths"])
    assert dense["value"] == 1
    assert {len(ids) for ids in dense["details"]["ids"]} <= set(range(1, 7))
    assert len(dense["samples"]) == len(dense["details"]["ids"]) == 10
    model = load_weights(tmp_path / "out" / "model")
    data = prepare_job(base, tmp_path / "other", *saved).evaluations["agreement"][1]
    for prompt, ids, share in zip(
        data.windows.tolist(), dense["details"]["ids"], second["samples"], strict=True
    ):
        hits = [next_token(model, prompt + ids[:i]) == token for i, token in enumerate(ids)]
        assert share == pytest.approx(sum(hits) / len(hits))
    assert second["relative"]["value"] == pytest.approx(second["value"] - 1)
    assert first["samples"] != second["samples"]
    assert len(calls) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "before_first_difference" in report
    other = run_job(base, tmp_path / "disk", *QUICK, "model.weights=disk")
    assert other["depths"][1]["metrics"]["agreement"]["samples"] == first["samples"]
    assert len(calls) == 1
    table = compare(result, other).markdown()
    assert "| 5 | agreement |" in table
    longer = run_job(base, tmp_path / "longer", *QUICK, "eval.agreement.new_tokens=7")
    assert len(calls) == 2
    with pytest.raises(ValueError, match="was measured on other continuations"):
        compare(longer, other)


def test_half_precision(windows):
    """In bfloat16, rounding may decide between the two most likely tokens, but rarely does."""
    model = pico("llama_gqa").bfloat16()
    found = Agreement(new_tokens=40).measure(model, None, TokenWindows(windows, 80, "text"))
    assert isinstance(found["agreement"], Metric)
    assert found["agreement"].value > 0.97


def test_default_command_composes():
    chosen = settings("eval=[perplexity,agreement]", "eval.perplexity.max_tokens=64").eval
    assert chosen["agreement"].max_tokens // chosen["agreement"].seq_len == 64
