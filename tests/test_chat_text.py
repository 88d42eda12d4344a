"""Chats as calibration text: rows of files, and answers of the model to built-in prompts."""

import json

import pytest
import torch

from come.data.prompts import FREE, PROMPTS, chat_prompts, prompt_starts
from come.data.sampling import Sampling, self_generated_windows
from come.data.sources.text_file import TextFile
from come.data.windows import calibration_windows, corpus_text, without_lines_of
from come.job.identity import _training_identity, job_hash
from come.job.sampled_text import sampled, with_samples
from come.models.loading import load_tokenizer, load_weights
from tests.bases import TEMPLATE, save_base
from tests.jobs import job_settings, prepare_job, settings

pytestmark = pytest.mark.usefixtures("private_caches")

ANSWERING = f"<s>{TEMPLATE}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
SAMPLED = ("calibration=self_generated", "calibration.chat=true", "eval=none")
SIZES = ("calibration.num_samples=6", "calibration.seq_len=40")
CHATS = [
    [
        {"role": "user", "content": f"How many layers has model {i}?"},
        {"role": "assistant", "content": f"It has {i * i} layers."},
    ]
    for i in range(60)
]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    """A checkpoint whose tokenizer has a chat template that writes the begin token."""
    folder = save_base(tmp_path_factory.mktemp("chat") / "base", "llama_gqa")
    (folder / "chat_template.jinja").write_text(ANSWERING)
    return folder


@pytest.fixture(scope="module")
def tokenizer(chat_base):
    return load_tokenizer(chat_base)


@pytest.fixture
def short_prompts(monkeypatch):
    """Six prompts of a few tokens, so that windows can be short."""
    monkeypatch.setattr("come.data.prompts.PROMPTS", [f"{'layers ' * i}?" for i in range(6)])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "messages": chat}) + "\n" for chat in CHATS))
    return path


# Chats in files


def test_rows_of_messages_are_rendered(chat_base, rows, tokenizer, tmp_path):
    words = (f"calibration.path={rows}", "calibration=text_file", "eval=none")
    job = prepare_job(chat_base, tmp_path / "out", *words, "calibration.chat=true")
    text = tokenizer.decode(job.calibration.windows.flatten())
    assert "<s><user>How many layers has model" in text
    assert "layers.\n\n\n<s><user>" in text
    with pytest.raises(
        ValueError, match="line 1: no field 'text' in a row; there are id, messages"
    ):
        prepare_job(chat_base, tmp_path / "out", *words)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"own": "a plain text about layers " * 99}) + "\n")
    words = (f"calibration.path={plain}", "calibration=text_file", "calibration.field=own")
    job = prepare_job(chat_base, tmp_path / "out", *words, "calibration.chat=true", "eval=none")
    assert "a plain text" in tokenizer.decode(job.calibration.windows.flatten())


def test_bad_rows_are_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": CHATS[0]})
    for bad, message in (
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"rows.jsonl, line 4: field 'messages' has",
        ),
        ({"messages": 7}, r"line 4: field 'messages' holds int \(7\); text, .* calibration.field"),
        ({"messages": [{"speaker": "me"}]}, "line 4: .* a list of records .* which is no chat"),
        ([], "rows.jsonl cannot be read: line 4 is no JSON object"),
    ):
        path.write_text(f"{good}\n\n{good}\n{json.dumps(bad)}\n")
        with pytest.raises(ValueError, match=message):
            corpus_text(TextFile(str(path), "messages"), tokenizer=tokenizer)
    path.write_text(f"{good}\n{{\n")
    with pytest.raises(ValueError, match="rows.jsonl cannot be read: line 2 is no JSON: Expecting"):
        corpus_text(TextFile(str(path), "messages"), tokenizer=tokenizer)


def test_chat_that_the_template_refuses_is_named(rows, chat_base):
    own = load_tokenizer(chat_base)
    own.chat_template = (
        "{% if '7?' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}x"
    )
    with pytest.raises(
        ValueError, match=r"text_file \(file .*\), document 8: .* cannot render a chat"
    ):
        corpus_text(TextFile(str(rows), "messages"), tokenizer=own)


@pytest.mark.parametrize("begin", [None, 1])
def test_begin_token_is_not_added_twice(rows, tokenizer, begin):
    """The template begins every chat with it; windows are full."""
    source = TextFile(str(rows), "messages")
    ids = tokenizer(corpus_text(source, tokenizer=tokenizer), add_special_tokens=False)["input_ids"]
    assert ids.count(1) == len(CHATS)
    drawn = calibration_windows(tokenizer, source, num_samples=50, seq_len=32, begin=begin)
    assert drawn.windows.shape == (50, 32)
    assert not ((drawn.windows[:, :-1] == 1) & (drawn.windows[:, 1:] == 1)).any()
    if begin is not None:
        assert (drawn.windows[:, 0] == begin).all()


def test_windows_that_begin_with_the_begin_token(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("<s>0123456<s>7")  # windows: the text's own begin token, or an added one
    drawn = calibration_windows(tokenizer, TextFile(str(path)), num_samples=3, seq_len=4, begin=1)
    assert {tokenizer.decode(row) for row in drawn.windows} == {"<s>012", "<s>345", "<s>6<s>7"}


def test_lines_of_the_template_stay(tmp_path, chat_base, tokenizer):
    """Lines of the held-out text are removed, but not the system message of every chat."""
    own, system = load_tokenizer(chat_base), "You are a helpful model that answers all questions."
    own.chat_template = f"<system>{system}\n{TEMPLATE}"
    assert without_lines_of(f"{system}\n", system) == ("", 1)
    path, held_out = tmp_path / "chats.jsonl", tmp_path / "held_out.jsonl"
    same = [{"role": "user", "content": "This question is asked in both of the two files."}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*CHATS, same]))
    held_out.write_text(json.dumps({"messages": same}))
    texts = [TextFile(str(each), "messages") for each in (path, held_out)]
    drawn = calibration_windows(own, texts[0], num_samples=100, seq_len=32, held_out=texts[1:])
    assert drawn.removed_lines == 1
    assert tokenizer.decode(drawn.windows.flatten()).count(system[:20]) > 20


# Answers of the model


def test_prompts_are_varied():
    assert len(set(PROMPTS)) == len(PROMPTS) == 40
    assert all(prompt.isascii() and len(prompt) < 100 for prompt in PROMPTS)


def test_prompts_end_where_the_answer_begins(tokenizer):
    found = chat_prompts(tokenizer)
    assert [tokenizer.decode(ids) for ids in found] == [
        f"<s><user>{p}\n<assistant>" for p in PROMPTS
    ]
    assert chat_prompts(tokenizer, begin=1) == found
    other = load_tokenizer(tokenizer.name_or_path)
    other.chat_template = ANSWERING.removeprefix("<s>")
    assert chat_prompts(other) == [ids[1:] for ids in found]
    assert chat_prompts(other, begin=1) == found


def test_every_prompt_starts_a_window_before_another_one_does_again():
    starts = prompt_starts([[4], [5, 6], [7, 8, 9]], 7, torch.Generator().manual_seed(0))
    assert starts.shape == (7, 3)
    for part in (starts[:3], starts[3:6]):
        assert sorted(part.tolist()) == [[4, FREE, FREE], [5, 6, FREE], [7, 8, 9]]


def test_windows_are_prompts_with_answers(chat_base, tokenizer, short_prompts):
    """Greedy answers, so that each window can be compared with the model's predictions."""
    model, prompts = load_weights(chat_base), chat_prompts(tokenizer)
    options = {"num_samples": 5, "seq_len": 40, "batch_size": 3, "progress": False}
    found = self_generated_windows(model, sampling=Sampling(1e-4), prompts=prompts, **options)
    assert found.windows.shape == (5, 40)
    assert found.source == "self_generated (answers to prompts, temperature 0.0001, top-p 1.0)"
    logits = model(found.windows).logits
    logits[..., :2] = -torch.inf  # padding and begin tokens; the end token may be drawn
    started, predicted = [], logits.argmax(-1)
    for ids, best in zip(found.windows.tolist(), predicted.tolist(), strict=True):
        (prompt,) = (p for p in prompts if p == ids[: len(p)])
        started.append(tuple(prompt))
        own = ids.index(2, len(prompt)) if 2 in ids[len(prompt) :] else len(ids)
        assert ids[len(prompt) : own] == best[len(prompt) - 1 : own - 1]
    assert len(set(started)) == 5
    assert len({len(start) for start in started}) > 1


def test_another_prompt_follows_the_end_of_an_answer(chat_base, tokenizer):
    model, prompts = load_weights(chat_base), [[4, 5, 2, 6], [7, 8], [9, 2, 2, 10, 11]]
    model.config.eos_token_id = [2, *range(30, 40)]
    model.generation_config.eos_token_id = [*range(40, 60)]
    options = {"num_samples": 12, "seq_len": 40, "progress": False, "prompts": prompts}
    found, ends = self_generated_windows(model, **options).windows, []
    assert not torch.isin(found, torch.tensor([0, 1])).any()
    for ids in found.tolist():
        at = 0
        while at < len(ids):
            starts = [p for p in prompts if p[: len(ids) - at] == ids[at : at + len(p)]]
            assert starts, f"no prompt at {at} in {ids}"
            at += len(starts[0])
            while at < len(ids) and ids[at] not in (2, *range(30, 60)):
                at += 1
            ends += ids[at : at + 1]
            at += 1
    assert set(ends) & set(range(30, 40))
    assert set(ends) & set(range(40, 60))
    assert torch.equal(self_generated_windows(model, **options).windows, found)
    without = self_generated_windows(model, **options | {"prompts": ()}).windows
    assert not torch.isin(without, torch.tensor(model.config.eos_token_id)).any()


def test_chat_reaches_calibration_and_training_text(chat_base, tokenizer, tmp_path, short_prompts):
    """Also after a job without it has filled the cache."""
    model = load_weights(chat_base)
    words = (*SIZES, "distill=come_sp", "distill.seq_len=40", "distill.validation_samples=2",
             "distill.shifted=0")  # fmt: skip
    with_chat, without = (
        prepare_job(chat_base, tmp_path / "out", *sampling, *words)
        for sampling in (SAMPLED, (SAMPLED[0], SAMPLED[2]))
    )
    assert with_chat.hash != without.hash
    for job, prompted in ((without, False), (with_chat, True)):
        for found in (with_samples(job, model), sampled(job, model, 1)):
            text = [tokenizer.decode(row) for row in found.windows]
            assert all(row.startswith("<s><user>") for row in text) == prompted
            assert ("answers to prompts" in found.source) == prompted
    mixed = prepare_job(
        chat_base, tmp_path / "out", *SIZES, "calibration=self_generated", "calibration.chat=true",
        "calibration.mix={self_generated:0.5,pydocs:0.5}", "eval=none",
    )  # fmt: skip
    text = [tokenizer.decode(row) for row in with_samples(mixed, model).windows]
    assert [row.startswith("<s><user>") for row in text] == [True, False] * 3


def test_begin_token_of_the_model_reaches_the_prompts(tmp_path, short_prompts):
    folder = save_base(tmp_path / "other", "llama_gqa")
    (folder / "chat_template.jinja").write_text(ANSWERING.removeprefix("<s>"))
    model = load_weights(folder)
    for begin in (True, False):
        words = (*SAMPLED, *SIZES, f"model.begin_token={str(begin).lower()}")
        found = with_samples(prepare_job(folder, tmp_path / "out", *words), model).windows
        assert ((found[:, 0] == 1).all(), (found[:, 1] == 1).any()) == (begin, False)


def test_identities_cover_chat(chat_base, rows):
    text = (f"calibration.path={rows}", "calibration=text_file", "calibration.field=messages")
    for words in (SAMPLED[:1], text):
        hashes = {
            job_hash(job_settings(chat_base, *words, *more))
            for more in ((), ("calibration.chat=true",))
        }
        assert len(hashes) == 2
    found = [
        _training_identity(settings("distill=come_sp", f"calibration.chat={chat}"))
        for chat in ("true", "false")
    ]
    assert found[0] != found[1]


# Errors before weights are loaded


@pytest.mark.parametrize("words", [SAMPLED, ("calibration=text_file", "calibration.chat=true")])
def test_tokenizer_without_a_template(base, rows, tmp_path, words):
    text = (f"calibration.path={rows}",) if words != SAMPLED else ()
    with pytest.raises(ValueError, match=(
        "^calibration.chat=true: the model's tokenizer has no chat template; leave it out, or take "
        "an instruct model$"
    )):  # fmt: skip
        prepare_job(base, tmp_path / "out", *words, *text)


def test_template_that_cannot_render_a_prompt(chat_base, tmp_path):
    folder = save_base(tmp_path / "other", "llama_gqa")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system message needed') }}")
    with pytest.raises(ValueError, match="calibration.chat=true: .* system message needed"):
        prepare_job(folder, tmp_path / "out", *SAMPLED, *SIZES)


@pytest.mark.parametrize("key", ["calibration.seq_len", "distill.seq_len"])
def test_windows_without_room_for_an_answer(chat_base, tokenizer, tmp_path, key, short_prompts):
    longest = max(map(len, chat_prompts(tokenizer)))
    words = (*SAMPLED, "distill=come_sp", "calibration.num_samples=4")
    for length in (longest, longest + 1):
        sizes = {"calibration.seq_len": 256, "distill.seq_len": 256} | {key: length}
        words = (*SAMPLED, "distill=come_sp", *(f"{k}={v}" for k, v in sizes.items()))
        if length > longest:
            prepare_job(chat_base, tmp_path / "out", *words)
            continue
        with pytest.raises(ValueError, match=(
            f"{key}={longest}: the prompts of calibration.chat=true have up to {longest} tokens, "
            f"and the answers follow; take {key}={2 * longest} or more"
        )):  # fmt: skip
            prepare_job(chat_base, tmp_path / "out", *words)


def test_chat_without_effect(text_file):
    for words, shown in (
        (["calibration=pydocs"], "pydocs"),
        ([f"calibration.path={text_file}"], "text_file"),
        (["calibration.mix={mmlu:0.5,pydocs:0.5}"], r"50% mmlu \+ 50% pydocs"),
    ):
        with pytest.raises(
            ValueError, match=f"chat=true has no effect with {shown}, which is plain"
        ):
            settings("calibration.chat=true", *words).check()
    settings("calibration.chat=true", "calibration.mix={self_generated:0.5,pydocs:0.5}").check()
    settings("calibration.chat=true", "calibration=wikitext2").check()


def test_no_template_on_the_command_line(command_line):
    code, output = command_line("calibration=self_generated", "calibration.chat=true", "eval=none")
    assert code == 1
    assert (
        output.strip().splitlines()[-1].startswith("error: calibration.chat=true: the model's tok")
    )
