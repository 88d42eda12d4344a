"""Text sources, windows and sampling."""

import json

import pytest
import torch

from come.data import decoding
from come.data.decoding import single_token_attention
from come.data.sampling import Sampling, cached, continued_windows, self_generated_windows
from come.data.sources.base import TEXT
from come.data.sources.hub import Hub
from come.data.sources.mmlu import MMLU
from come.data.sources.pydocs import PyDocs
from come.data.sources.text_file import TextFile
from come.data.windows import (
    calibration_windows,
    corpus_text,
    evaluation_windows,
    text_part,
    without_lines_of,
)
from come.models.loading import load_model, load_tokenizer
from tests.conftest import FAMILIES, LAYERS, VOCAB, pico


@pytest.fixture(scope="module")
def tokenizer(pico_folder):
    return load_tokenizer(pico_folder)


def draw(tokenizer, source, **options):
    options = {"num_samples": 6, "seq_len": 32} | options
    return calibration_windows(tokenizer, source, **options)


def test_windows_are_seeded(tokenizer, text_file):
    source = TextFile(str(text_file))
    first, again, other = (draw(tokenizer, source, seed=seed) for seed in (0, 0, 1))
    assert first.windows.shape == (6, 32)
    assert first.windows.dtype == torch.int64
    assert torch.equal(first.windows, again.windows)
    assert first.hash == again.hash != other.hash
    assert first.tokens == 192 < first.corpus_tokens


def lines_of(tokenizer, windows):
    text = "\n".join(tokenizer.decode(w) for w in windows.windows)
    return {line.strip() for line in text.splitlines() if len(line) > 50}


@pytest.mark.parametrize("source", ["file", "pydocs", "mmlu"])
def test_calibration_and_held_out_text_are_disjoint(tokenizer, text_file, source):
    source = {"file": TextFile(str(text_file)), "pydocs": PyDocs(), "mmlu": MMLU()}[source]
    drawn = draw(tokenizer, source, num_samples=60, seq_len=512, held_out=[source])
    held_out = evaluation_windows(tokenizer, source, seq_len=128, others=[source])
    seen, unseen = lines_of(tokenizer, drawn), lines_of(tokenizer, held_out)
    assert len(seen) > 20
    assert len(unseen) > 20
    assert not seen & unseen


def test_evaluation_part_of_a_text(tokenizer, text_file):
    source, same = TextFile(str(text_file)), TextFile(str(text_file))
    text = text_file.read_text()
    source.part = (0.6, 0.8)
    for others in ([], [same]):
        found = evaluation_windows(tokenizer, source, seq_len=16, others=others)
        assert found.corpus_tokens == len(tokenizer(text_part(text, source.part))["input_ids"])
    source.part = (0.5, 0.8)
    evaluation_windows(tokenizer, source, seq_len=16)
    with pytest.raises(
        ValueError, match=r"eval.perplexity.text_range=\[0.5, 0.8\]: calibration or training draws"
    ):
        evaluation_windows(tokenizer, source, seq_len=16, others=[same])


def test_texts_of_an_earlier_run_are_not_evaluated(tokenizer, text_file):
    source = TextFile(str(text_file))
    drawn = draw(tokenizer, source, num_samples=2, seq_len=16)
    assert drawn.drawn_from == {source.content: 1.0}
    message = (
        "eval.perplexity: the model was calibrated or trained on windows from all of text_file"
    )
    with pytest.raises(ValueError, match=message):
        evaluation_windows(tokenizer, source, seq_len=16, drawn_from=drawn.drawn_from)
    part = draw(tokenizer, source, num_samples=2, seq_len=16, held_out=[source]).drawn_from
    assert part == {source.content: 0.6}
    apart = evaluation_windows(tokenizer, source, seq_len=16, others=[source])
    found = evaluation_windows(tokenizer, source, seq_len=16, drawn_from=part)
    assert torch.equal(found.windows, apart.windows)
    source.part = (0.5, 0.8)
    with pytest.raises(ValueError, match="draws from the first 60% of the same text"):
        evaluation_windows(tokenizer, source, seq_len=16, drawn_from=part)
    assert draw(tokenizer, PyDocs(), num_samples=2, seq_len=16).drawn_from == {
        PyDocs().content: 0.6
    }


def test_held_out_lines_are_removed_from_calibration(tokenizer, text_file, tmp_path):
    lines = text_file.read_text().splitlines()
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*lines[:500], "something of its own " * 5]))
    held_out = TextFile(str(other))
    drawn = draw(
        tokenizer, TextFile(str(text_file)), num_samples=50, seq_len=512, held_out=[held_out]
    )
    assert drawn.removed_lines == 500
    assert not lines_of(tokenizer, drawn) & set(lines[:500])
    whole = evaluation_windows(tokenizer, held_out, seq_len=64, others=[TextFile(str(text_file))])
    assert "Line 0 of" in tokenizer.decode(whole.windows[0])  # the evaluation file is not cut


def test_short_lines_are_not_removed():
    assert without_lines_of("a\nb\nc\n", "b\n") == ("a\nb\nc\n", 0)


def test_text_parts_are_split_at_line_ends():
    text = "".join(f"line {i}\n" for i in range(100))
    parts = [text_part(text, cut) for cut in ((0.0, 0.6), (0.6, 0.8), (0.8, 1.0))]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)


def test_pydocs_has_no_repeated_paragraphs():
    text = corpus_text(PyDocs())
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(text) > 200_000


def test_mmlu_has_five_questions_per_subject():
    assert 250 < len(list(MMLU().documents())) <= 285


def test_too_little_text(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words here")
    with pytest.raises(ValueError, match=r"has \d+ tokens for calibration, 0 windows of 32"):
        draw(tokenizer, TextFile(str(path)))
    with pytest.raises(ValueError, match=r"evaluation text too short: .* gives \d+ tokens"):
        evaluation_windows(tokenizer, TextFile(str(path)), seq_len=512)


def test_rows_of_jsonl_and_parquet(tmp_path):
    from pyarrow import parquet, table

    rows = [{"body": "first text"}, {"body": "second text"}]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("\n".join(json.dumps(row) for row in rows))
    parquet.write_table(table({"body": ["first text", "second text"]}), tmp_path / "rows.parquet")
    for path in (jsonl, tmp_path / "rows.parquet"):
        assert list(TextFile(str(path), "body").documents()) == ["first text", "second text"]
        with pytest.raises(ValueError, match=r"no field 'text' in a row; there are body"):
            list(TextFile(str(path)).documents())


def test_invalid_text_files(tmp_path):
    empty, odd, binary = tmp_path / "empty.txt", tmp_path / "a.docx", tmp_path / "b.txt"
    empty.write_text("")
    odd.write_text("x")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path, message in (
        (tmp_path / "no.txt", "does not exist"),
        (empty, "is empty"),
        (odd, "the ending must be one of .txt, .jsonl, .parquet"),
        (binary, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus_text(TextFile(str(path)))
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n")
    with pytest.raises(ValueError, match="holds no text"):
        corpus_text(TextFile(str(blank)))
    with pytest.raises(ValueError, match=r"text_file needs a file: calibration.path=FILE"):
        TEXT.create("text_file", {})


def test_hub_source_identity_depends_on_content(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "one", "more": "1"}')
    first = Hub(dataset="json", data_files=str(path)).identity
    assert Hub(dataset="json", data_files=str(path), field="more").identity != first
    path.write_text('{"text": "two", "more": "1"}')
    assert Hub(dataset="json", data_files=str(path)).identity != first


@pytest.mark.parametrize("builder", ["json", "text", "parquet"])
def test_hub_source_reads_local_files(builder, tmp_path):
    from pyarrow import parquet, table

    path = tmp_path / f"rows.{builder}"
    if builder == "json":
        path.write_text('{"text": "one", "more": "1"}\n{"text": "two", "more": ""}\n')
    elif builder == "text":
        path.write_text("one\ntwo\n")
    else:
        parquet.write_table(table({"text": ["one", "two"]}), path)
    source = Hub(dataset=builder, data_files=str(path))
    assert list(source.documents()) == ["one", "two"]
    if builder == "json":
        joined = Hub(dataset=builder, data_files=str(path), field="text+more")
        assert list(joined.documents()) == ["one\n1", "two"]
    with pytest.raises(ValueError, match="no field 'body' in a row"):
        list(Hub(dataset=builder, data_files=str(path), field="body").documents())


def test_hub_source_without_network():
    source = Hub(dataset="allenai/c4", subset="en")
    with pytest.raises(ValueError, match=r"cannot be read.*calibration=pydocs"):
        next(source.documents())


def test_self_generated_windows_are_seeded(pico_folder):
    model, _ = load_model(pico_folder)
    options = {"num_samples": 5, "seq_len": 12, "batch_size": 3, "progress": False}
    first = self_generated_windows(model, **options)
    again = self_generated_windows(model, **options)
    other = self_generated_windows(model, **options, seed=1)
    assert first.windows.shape == (5, 12)
    assert torch.equal(first.windows, again.windows)
    assert first.hash != other.hash
    assert (first.windows[:, 0] == model.config.bos_token_id).all()
    assert not torch.isin(first.windows[:, 1:], torch.tensor([0, 1, 2])).any()


def test_low_temperature_is_greedy(pico_folder):
    model, _ = load_model(pico_folder)
    ids = self_generated_windows(
        model, num_samples=3, seq_len=10, sampling=Sampling(1e-4), progress=False
    ).windows
    logits = model(ids).logits[:, 1:-1]
    logits[..., :3] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, 2:])


def test_evaluation_uses_only_the_held_out_part_of_training_text(text_file, pico_folder):
    _, tokenizer = load_model(pico_folder)
    same, other = TextFile(str(text_file)), PyDocs()
    whole = evaluation_windows(tokenizer, same, seq_len=16, others=[other])
    part = evaluation_windows(tokenizer, same, seq_len=16, others=[other, same])
    assert len(part.windows) < 0.25 * len(whole.windows)


def test_top_p_and_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = Sampling(1.0, 0.75).draw(logits, generator)[:, 0]
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    drawn = Sampling(0.5, 1.0).draw(logits, generator)[:, 0]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares.tolist() == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)


def test_a_token_without_probability_is_never_drawn():
    """Also the first and the last one, and with rounding of the sum."""
    logits = torch.randn(2000, 51, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 7, 8, 50]] = -torch.inf
    drawn = Sampling().draw(logits, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 1)
    assert not torch.isin(drawn, torch.tensor([0, 7, 8, 50])).any()
    shares = torch.bincount(drawn[:, 0], minlength=51) / 2000
    assert (shares - logits.softmax(-1).mean(0)).abs().max() < 0.02
    certain = torch.full((5, 9), -torch.inf)
    certain[:, 8] = 3.0
    assert Sampling().draw(certain, torch.Generator().manual_seed(0)).flatten().tolist() == [8] * 5


@pytest.mark.parametrize("vocab", [255, 256, 257, 3000])  # 3000: in two parts
def test_tokens_are_those_of_running_sums_of_the_whole_vocabulary(vocab):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, vocab, generator=generator)
    logits[torch.rand(500, vocab, generator=generator) < 0.3] = -torch.inf
    logits[:100, :-1] = -torch.inf  # only the last token, or the last of the first block
    logits[:50, 254] = logits[50:100, -1] = 9.0
    drawn = Sampling().draw(logits, torch.Generator().manual_seed(1))[:, 0]
    sums = logits.double().softmax(-1).cumsum(-1)
    heights = torch.rand(500, 1, generator=torch.Generator().manual_seed(1)).double()
    expected = (sums <= heights * sums[:, -1:]).sum(-1)
    assert (drawn == expected).float().mean() > 0.99  # shares are rounded to float32
    assert logits.gather(1, drawn[:, None]).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_while_sampling(family, monkeypatch):
    """As exact as the model's own, which is used again afterwards."""
    model, calls = pico(family), []
    ids = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        decoding, "single_token_attention",
        lambda *given, **others: calls.append(1) or single_token_attention(*given, **others),
    )  # fmt: skip

    @torch.no_grad()
    def logits():
        cache, found = None, []
        for step in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[:, -1])
        return torch.stack(found)

    own = logits()
    with decoding.fast_single_tokens(model):
        assert torch.allclose(logits(), own, atol=1e-5)
    assert len(calls) == 4 * LAYERS
    assert torch.equal(logits(), own)
    assert len(calls) == 4 * LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_single_token_attention(heads, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 1, 8, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, groups, 5, 8, generator=generator).to(dtype).transpose(0, 1)
    found, weights = single_token_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.3
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3, enable_gqa=True
    )
    assert found.dtype == dtype
    error = (found.double() - expected.transpose(1, 2)).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 0.02)
    assert weights is None


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_head_reads_contiguous_states(pico_folder, weights):
    """Of prompts too: a product with strided states copies the head in half precision."""
    model, _ = load_model(pico_folder, dtype="bfloat16", weights=weights)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append((tuple(inputs[0].shape), inputs[0].is_contiguous()))
    )
    ids = torch.arange(3, 18).view(3, 5)
    last = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
    assert seen == [((3, 1, model.config.hidden_size), True)]
    every = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(last[:, 0].float(), every[:, -1].float(), atol=0.02)


def test_likeliest_windows_are_kept(pico_folder):
    model, _ = load_model(pico_folder)
    options = {"seq_len": 12, "progress": False}
    every = self_generated_windows(model, num_samples=8, **options)
    kept = self_generated_windows(model, num_samples=4, keep=0.5, **options)
    losses = [
        float(model(ids[None], labels=ids[None], use_cache=False).loss) for ids in every.windows
    ]
    best = sorted(sorted(range(8), key=lambda i: losses[i])[:4])
    assert torch.equal(kept.windows, every.windows[best])


def test_continued_windows_start_with_real_text(pico_folder):
    model, tokenizer = load_model(pico_folder)
    given = calibration_windows(tokenizer, PyDocs(), num_samples=3, seq_len=16)
    found = continued_windows(model, given, count=5, begin=4, progress=False)
    assert torch.equal(found.windows[:3], given.windows)
    assert torch.equal(found.windows[3:6, :4], given.windows[:, :4])
    assert torch.equal(found.windows[6:, :4], given.windows[:2, 6:10])
    assert found.windows.shape == (8, 16)
    assert not torch.equal(found.windows[3:6, 4:], given.windows[:, 4:])
    assert "5 windows continued from 4 tokens each" in found.source


def test_text_is_sampled_once(pico_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COME_CACHE", str(tmp_path))
    model, _ = load_model(pico_folder)

    def make():
        made.append(1)
        return self_generated_windows(model, num_samples=2, seq_len=8, progress=False)

    made = []
    first, second = cached(["a", 1], make), cached(["a", 1], make)
    assert first.source == second.source
    assert torch.equal(first.windows, second.windows)
    assert len(made) == 1
    cached(["b", 1], make)
    assert len(made) == 2


def test_backward_draw_starts_with_windows_outside_calibration(tokenizer, tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(20000))))  # so that no two windows are alike
    calibrated = draw(tokenizer, TextFile(str(path)), num_samples=32).windows.tolist()
    every = {"num_samples": 10**7, "at_most": True, "backwards": True}
    training = draw(tokenizer, TextFile(str(path)), **every).windows.tolist()
    assert len(training) > 48
    assert training[-32:] == calibrated[::-1]
    assert not [row for row in training[:16] if row in calibrated]
