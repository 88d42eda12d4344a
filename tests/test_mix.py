"""Calibration windows from several text sources."""

import json

import pytest
import torch

from come.data.mix import check_shares, interleaved, window_counts
from come.data.sampling import self_generated_windows, unused_ids
from come.data.sources.mmlu import MMLU
from come.data.windows import TokenWindows, calibration_windows
from come.job.budget import sampling_cost
from come.job.dry_run import dry_run
from come.job.identity import job_hash
from come.job.sampled_text import with_samples
from come.models.loading import load_tokenizer, load_weights
from come.schema.explicit import check_explicit
from tests.jobs import QUICK, job_settings, prepare_job, run_job, settings

KEY = "calibration.mix"
MIX = "calibration.mix={self_generated:0.5,mmlu:0.25,pydocs:0.25}"
SMALL = ("calibration.num_samples=16", "calibration.seq_len=16", "eval=none")
HALVES = "{mmlu:0.5,pydocs:0.5}"
SPREAD = [[16, 8, 8], [1, 31], [5, 7, 20], [1, 1, 2], [10, 10, 10, 2], [32]]


pytestmark = pytest.mark.usefixtures("private_caches")


def mixed(folder, out, *words):
    """Settings of a job with a mix, which replaces calibration=pydocs of small jobs."""
    source = () if any(w.startswith("calibration=") for w in words) else ("calibration=pydocs",)
    return prepare_job(folder, out, *source, *words)


def checked(*overrides):
    composed = settings(*overrides)
    composed.check()
    check_explicit(composed, overrides)


@pytest.mark.parametrize(("shares", "total", "counts"), [
    ({"self_generated": 0.5, "pydocs": 0.25, "mmlu": 0.25}, 32, [8, 8, 16]),
    ({"a": 0.4, "b": 0.6}, 8, [3, 5]),
    ({"b": 0.5, "a": 0.5}, 3, [2, 1]),  # equal remainders: the first name
    ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 32, [11, 11, 10]),
    ({"a": 0.29, "b": 0.71}, 100, [29, 71]),
    ({"a": 0.03, "b": 0.97}, 32, [1, 31]),
    ({"a": 1.0}, 7, [7]),
])  # fmt: skip
def test_windows_are_divided_by_largest_remainder(shares, total, counts):
    found = window_counts(KEY, shares, total)
    assert list(found) == sorted(shares)
    assert list(found.values()) == counts
    assert found == window_counts(KEY, dict(reversed(shares.items())), total)


def test_share_without_a_window():
    with pytest.raises(ValueError, match=(
        r"calibration.mix.b=0.01 of calibration.num_samples=32 is no window; raise the share, or "
        r"calibration.num_samples to 100$"
    )):  # fmt: skip
        window_counts(KEY, {"a": 0.99, "b": 0.01}, 32)
    assert window_counts(KEY, {"a": 0.99, "b": 0.01}, 100)["b"] == 1


def test_sum_of_shares_has_a_tolerance():
    check_shares(KEY, {"a": 0.5, "b": 0.5 + 9e-7}, ["a", "b"])
    for gap in (2e-6, -2e-6):
        with pytest.raises(ValueError, match="the shares sum to"):
            check_shares(KEY, {"a": 0.5, "b": 0.5 + gap}, ["a", "b"])


@pytest.mark.parametrize("counts", SPREAD)
def test_every_stretch_of_windows_has_the_shares(counts):
    """Also the first windows, which merges are fitted to, and the last ones, which judge them."""
    parts = [
        TokenWindows(
            torch.tensor([[n, i] for i in range(count)]), 10 + n, f"text {n}", n, {f"{n}": n / 10}
        )
        for n, count in enumerate(counts)
    ]
    found, total = interleaved(parts), sum(counts)
    assert len(found.windows) == total
    for n, count in enumerate(counts):
        own = found.windows[found.windows[:, 0] == n]
        assert own[:, 1].tolist() == list(range(count))
        for length in range(1, total + 1):
            for stretch in (found.windows[:length], found.windows[-length:]):
                assert abs(int((stretch[:, 0] == n).sum()) - length * count / total) < 1
    assert found.source == " + ".join(part.source for part in parts)
    assert found.corpus_tokens == sum(part.corpus_tokens for part in parts)
    assert found.removed_lines == sum(part.removed_lines for part in parts)
    assert found.drawn_from == {f"{n}": n / 10 for n in range(len(counts))}


def test_a_mix_draws_its_share_from_every_source(base, tmp_path):
    model, tokenizer = load_weights(base), load_tokenizer(base)
    job = mixed(base, tmp_path / "out", *SMALL, MIX, "calibration.seed=3")
    found = with_samples(job, model)
    sampled = self_generated_windows(
        model, num_samples=8, seq_len=16, seed=3, banned=unused_ids(model, tokenizer)
    )
    questions = calibration_windows(tokenizer, MMLU(), num_samples=4, seq_len=16, seed=3)
    own, rest = sampled.windows.tolist(), questions.windows.tolist()
    names = [
        "self" if row in own else "mmlu" if row in rest else "pydocs"
        for row in found.windows.tolist()
    ]
    assert names == ["self", "mmlu", "self", "pydocs"] * 4
    assert found.windows.shape == (16, 16)
    assert found.source.startswith("50% self_generated (temperature 1.0, top-p 1.0) + 25% mmlu (")
    assert " + 25% pydocs (pydocs " in found.source
    # the order of the names does not matter
    other = "calibration.mix={pydocs:0.25,self_generated:0.5,mmlu:0.25}"
    again = mixed(base, tmp_path / "again", *SMALL, other, "calibration.seed=3")
    assert with_samples(again, model).hash == found.hash
    assert again.hash == job.hash
    reseeded = mixed(base, tmp_path / "reseeded", *SMALL, MIX, "calibration.seed=4")
    assert not set(map(tuple, with_samples(reseeded, model).windows.tolist())) & set(
        map(tuple, found.windows.tolist())
    )


def test_continuations_follow_a_mix_of_texts(base, tmp_path):
    words = ("calibration.mix={mmlu:0.5,pydocs:0.5}", "calibration.num_continuations=4")
    job = mixed(base, tmp_path / "out", *SMALL, *words, "calibration.prefix_tokens=4")
    found = with_samples(job, load_weights(base)).windows
    assert torch.equal(found[:16], job.calibration.windows)
    assert torch.equal(found[16:, :4], found[:4, :4])


def test_every_source_is_disjoint_from_the_held_out_text(base, tmp_path):
    """The file is evaluated too, and the rows of the dataset repeat lines of its held-out part."""
    path, other = tmp_path / "text.txt", tmp_path / "rows.json"
    lines = [
        f"Line {i} of the text speaks of the number {i} and of no other one." for i in range(400)
    ]
    path.write_text("\n".join(lines))
    rows = [
        *lines[350:],
        *(f"Row {i} of its own, with more than forty letters." for i in range(400)),
    ]
    other.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    words = (
        f"calibration.path={path}", "calibration=text_file", "calibration.dataset=json",
        f"calibration.data_files={other}", "calibration.mix={hub:0.5,text_file:0.5}",
        f"eval.perplexity.path={path}", "calibration.num_samples=100", "calibration.seq_len=32",
    )  # fmt: skip
    job = mixed(base, tmp_path / "out", *words)
    tokenizer = load_tokenizer(base)
    assert job.calibration.removed_lines == 50  # from the rows
    drawn = tokenizer.decode(job.calibration.windows.flatten())
    held_out = tokenizer.decode(job.evaluations["perplexity"][1][""].windows.flatten())
    assert "of its own" in drawn
    for i in range(400):
        assert f"Line {i} of the text" not in (held_out if i < 310 else drawn)
    assert "Line 325 of the text" in held_out


def test_job_hash_covers_the_mix(base, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "x")
    first, *others, reversed_ = (
        job_hash(job_settings(base, "calibration=text_file", f"calibration.path={path}", mix))
        for path, mix in (
            (text_file, "calibration.mix={pydocs:0.5,text_file:0.5}"),
            (text_file, "calibration.mix={mmlu:0.5,text_file:0.5}"),
            (text_file, "calibration.mix={pydocs:0.6,text_file:0.4}"),
            (other, "calibration.mix={pydocs:0.5,text_file:0.5}"),
            (text_file, "calibration.mix={text_file:0.5,pydocs:0.5}"),
        )
    )
    assert first == reversed_
    assert len({first, *others}) == 4


@pytest.mark.parametrize(("words", "message"), [
    (["{mmlu:0.5,pydocs:0.4}"], r"mix=\{mmlu:0.5,pydocs:0.4\}: the shares sum to 0.9 and"),
    (["{}"], "the shares sum to 0 and must sum to 1"),
    (["0.5"], "calibration.mix=0.5: must be a mapping, or null"),
    (["{pydocs:1.5,mmlu:-0.5}"], "mix.mmlu=-0.5: must be a number above 0, or leave it out"),
    (["{pydocs:true}"], "calibration.mix.pydocs=True: must be a number"),
    (["{pydocs:half}"], "calibration.mix.pydocs=half: must be a number"),
    (["{c4:0.5,pydocs:0.5}"],
     r"calibration.mix: there is no text source 'c4' \(available: hub, mmlu, pydocs, "
     r"self_generated, text_file\); a dataset is the source hub"),
    (["{mmlu:0.01,pydocs:0.99}"], "calibration.num_samples to 100"),
    ([HALVES, "calibration.source=mmlu"],
     "calibration.source has no effect with calibration.mix; leave it out"),
    ([HALVES, "calibration=wikitext2"], "calibration has no effect with calibration.mix"),
    ([HALVES, "calibration.path=a.txt"],
     "calibration.path=a.txt is for calibration=text_file, not 50% mmlu"),
    (["{text_file:0.5,pydocs:0.5}"], "text_file needs a file: calibration.path=FILE"),
    (["{text_file:0.5,pydocs:0.5}", "calibration.path=/no/a.txt"], "/no/a.txt does not exist"),
    (["{hub:0.5,pydocs:0.5}"], "a hub source needs a dataset: calibration.dataset"),
    (["{self_generated:0.5,pydocs:0.5}", "calibration.num_continuations=2"], "continues real text"),
    ([HALVES, "distill=come_sp"],
     "distill=come_sp trains on one text, not on calibration.mix; choose the text with distill"),
])  # fmt: skip
def test_invalid_mixes(words, message):
    overrides = [f"{KEY}={words[0]}", *words[1:]]
    with pytest.raises(ValueError, match=message):
        checked(*overrides)


def test_choices_that_a_mix_uses(text_file):
    for words in (
        ["calibration=wikitext2", "calibration.mix={hub:0.5,pydocs:0.5}"],
        ["calibration=pydocs", "calibration.mix={mmlu:0.5,pydocs:0.5}", "calibration.seed=1"],
        [f"calibration.path={text_file}", "calibration.mix={text_file:0.5,self_generated:0.5}"],
        ["calibration.mix={mmlu:0.5,pydocs:0.5}", "distill=come_sp", "distill.source=pydocs"],
    ):
        checked(*words)


def test_errors_of_a_mix_on_the_command_line(command_line):
    code, output = command_line("calibration.mix={pydocs:0.5,mmlu:0.6}", "eval=none")
    assert code == 1
    assert output.strip().splitlines() == [
        "error: calibration.mix={pydocs:0.5,mmlu:0.6}: the shares sum to 1.1 and must sum to 1; "
        "raise or lower one of them"
    ]


def test_short_text_of_a_mix(base, text_file, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words here")
    words = (f"calibration.path={path}", "calibration=text_file", "calibration.num_samples=40")
    with pytest.raises(ValueError, match=(
        "calibration text too short: text_file .*, 0 windows of 32; calibration.mix.text_file=0.25 "
        "of calibration.num_samples=40 asks for 320 tokens. Lower calibration.num_samples"
    )):  # fmt: skip
        mixed(base, tmp_path / "out", *words, "calibration.mix={text_file:0.25,pydocs:0.75}")


@pytest.mark.parametrize(("mix", "weight"), [
    ("{self_generated:0.5,pydocs:0.5}", 0.2), ("{mmlu:0.5,pydocs:0.5}", 0.0),
])  # fmt: skip
def test_repeat_weight_of_a_mix(mix, weight):
    assert settings(f"{KEY}={mix}").merge.selection.repeat_weight == weight


def test_records_name_the_mix(base, tmp_path):
    words = (*SMALL[:2], "calibration=pydocs", MIX)
    lines = "\n".join(dry_run(job_settings(base, *words, *QUICK), tmp_path / "dry"))
    assert "calibrated on 25% mmlu + 25% pydocs + 50% self_generated" in lines
    real = job_settings(base, "calibration=pydocs", "calibration.mix={mmlu:0.5,pydocs:0.5}", *QUICK)
    assert "50% mmlu (mmlu lm-eval" in "\n".join(dry_run(real, tmp_path / "dry"))
    result = run_job(base, tmp_path / "out", *words, *QUICK)
    source = "50% self_generated (temperature 1.0, top-p 1.0) + 25% mmlu (mmlu lm-eval"
    assert result["calibration"]["source"].startswith(source)
    assert result["calibration"]["windows"] == 16
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["provenance"]["calibration"] == result["calibration"]
    assert source in (tmp_path / "out" / "model" / "README.md").read_text()
    assert result["settings"]["calibration"]["mix"] == {
        "self_generated": 0.5, "mmlu": 0.25, "pydocs": 0.25,
    }  # fmt: skip


def test_sampling_cost_counts_the_sampled_windows(base, tmp_path):
    sizes = ("calibration.seq_len=34", "calibration.num_samples=128", "model.weights=disk")
    job = mixed(base, tmp_path / "out", *sizes, MIX, "eval=none")
    assert "reads all layers 64 times" in sampling_cost(job.settings, job.shape)
    alone = mixed(base, tmp_path / "out", "calibration=self_generated", *sizes, "eval=none")
    assert "reads all layers 128 times" in sampling_cost(alone.settings, alone.shape)
